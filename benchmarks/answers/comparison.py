"""Compares two recordings case by case."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.answers.recording import RAISED, Recording

EQUAL, CLOSE, DIFFERENT = "equal bits", "within tolerance", "different"
#: Cases that a report names of each kind.
SHOWN = 20
Answer = Mapping[str, Tensor | str]


class Verdict(NamedTuple):
    """How two answers to one case compare.

    Attributes:
        status: `EQUAL`, `CLOSE` or `DIFFERENT`.
        why: the first field that differs, and how; empty if the bits are equal.
    """

    status: str
    why: str = ""


@dataclass
class Comparison:
    """Two recordings, compared.

    Attributes:
        verdicts: of the cases of both, by name.
        raised: number of cases of both that raised the same error.
        only_base, only_here: names of the cases of one of them.
        exact: names of the cases whose bits have to be equal.
    """

    verdicts: dict[str, Verdict]
    raised: int
    only_base: list[str] = field(default_factory=list)
    only_here: list[str] = field(default_factory=list)
    exact: set[str] = field(default_factory=set)

    @property
    def differing(self) -> dict[str, str]:
        """Name of each differing case -> how it differs."""
        return {name: verdict.why for name, verdict in self.verdicts.items() if verdict.status == DIFFERENT}

    def failed(self) -> bool:
        """Return whether a case differs or is in one recording alone."""
        return bool(self.differing or self.only_base or self.only_here)

    def report(self) -> str:
        """Return a table of the groups of cases, and the first cases that differ or are in one recording alone."""
        counts = Counter((self._group(name), verdict.status) for name, verdict in self.verdicts.items())
        groups = sorted({group for group, _ in counts})
        statuses = (EQUAL, CLOSE, DIFFERENT)
        rows = {group: [counts[group, status] for status in statuses] for group in groups}
        rows["all"] = [sum(row[column] for row in rows.values()) for column in range(len(statuses))]
        lines = [_line("group", "cases", *statuses), *(_line(name, sum(row), *row) for name, row in rows.items())]
        lines.append(f"{self.raised} of them raised the same error in both")
        for title, names in (("only in the base", self.only_base), ("only here", self.only_here)):
            if names:
                lines += [f"{len(names)} cases {title}:", *(f"  {name}" for name in _first(names))]
        if self.differing:
            differing = [f"{name}: {why}" for name, why in self.differing.items()]
            lines += [f"{len(differing)} cases differ:", *(f"  {line}" for line in _first(differing))]
        return "\n".join(lines)

    def _group(self, name: str) -> str:
        return name.split(" | ")[0] + (", bits" if name in self.exact else "")


def compare(base: Recording, here: Recording) -> Comparison:
    """Compare the cases that two recordings have in common, by the tolerances of the base."""
    common = [name for name in base.answers if name in here.answers]
    verdicts = {name: verdict(base.answers[name], here.answers[name], base.tolerances[name]) for name in common}
    return Comparison(
        verdicts,
        raised=sum(RAISED in base.answers[name] and verdicts[name].status == EQUAL for name in common),
        only_base=[name for name in base.answers if name not in here.answers],
        only_here=[name for name in here.answers if name not in base.answers],
        exact={name for name in common if base.tolerances[name] == 0},
    )


def verdict(base: Answer, here: Answer, tolerance: float) -> Verdict:
    """Compare two answers to one case.

    Texts, integers (such as exit layers) and shapes have to be equal, floating-point numbers up to the tolerance,
    which is absolute for numbers up to 1 and relative for larger ones.
    """
    if set(base) != set(here):
        return Verdict(DIFFERENT, f"has {_fields(here)} instead of {_fields(base)}")
    worst = Verdict(EQUAL)
    for name, one in base.items():
        found = _field_verdict(name, one, here[name], tolerance)
        if found.status == DIFFERENT:
            return found
        if found.status == CLOSE:
            worst = found
    return worst


def _field_verdict(name: str, base: Tensor | str, here: Tensor | str, tolerance: float) -> Verdict:
    if isinstance(base, str) or isinstance(here, str):
        return _text_verdict(name, *(value if isinstance(value, str) else _kind(value) for value in (base, here)))
    if base.shape != here.shape or base.dtype != here.dtype:
        return Verdict(DIFFERENT, f"{name} is {_kind(here)} instead of {_kind(base)}")
    if not base.is_floating_point():
        wrong = (base != here).nonzero()
        return Verdict(EQUAL) if not len(wrong) else Verdict(DIFFERENT, _at(name, base, here, wrong[0]))
    bits = torch.int64 if base.dtype == torch.float64 else torch.int32
    if torch.equal(base.view(bits), here.view(bits)):
        return Verdict(EQUAL)
    same = (base == here) | (base.isnan() & here.isnan())
    # in float64, where no difference of float32 numbers rounds to 0
    wide = base.double()
    off = torch.where(same, 0.0, (wide - here.double()).abs() / wide.abs().clamp(min=1.0))
    off = torch.where(off.isnan(), torch.inf, off)
    place = (off == off.max()).nonzero()[0]
    return Verdict(CLOSE if off.max() <= tolerance and tolerance else DIFFERENT, _at(name, base, here, place))


def _text_verdict(name: str, base: str, here: str) -> Verdict:
    if base == here:
        return Verdict(EQUAL)
    first = next((place for place, (a, b) in enumerate(zip(base, here, strict=False)) if a != b), 0)
    one, other = (repr(text[max(first - 30, 0) : first + 30]) for text in (base, here))
    return Verdict(DIFFERENT, f"{name} has {other} instead of {one}")


def _line(title: str, *cells: str | int) -> str:
    return "".join([f"{title:24}", *(f"{cell:>18}" for cell in cells)])


def _at(name: str, base: Tensor, here: Tensor, place: Tensor) -> str:
    index = tuple(place.tolist())
    return f"{name}{list(index) or ''} is {here[index].item():.9g} instead of {base[index].item():.9g}"


def _fields(answer: Answer) -> str:
    return f"an error {answer[RAISED]}" if RAISED in answer else ", ".join(sorted(answer))


def _kind(value: Tensor) -> str:
    return f"{value.dtype} {list(value.shape)}"


def _first(lines: list[str]) -> list[str]:
    return lines if len(lines) <= SHOWN else [*lines[:SHOWN], f"and {len(lines) - SHOWN} more"]
