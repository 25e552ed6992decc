"""A recording: the answers to named cases, as two arrays of numbers and an index of names."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

#: Files of a recording.
NUMBERS, INDEX = "answers.safetensors", "names.json"
#: Difference of numbers that counts as rounding: absolute up to 1, and relative above.
ROUNDING = 1e-6
#: Field of a case that raised an error, with the name of its class; messages may change.
RAISED = "raised"


class Case(NamedTuple):
    """A question to a model.

    Attributes:
        name: of its own; parts are separated by `` | ``, the first one is the group.
        ask: returns the answer, tensors and texts by name; None is left out.
        tolerance: allowed difference of numbers; 0: the bits have to be equal.
    """

    name: str
    ask: Callable[[], Mapping[str, Tensor | str | None]]
    tolerance: float = ROUNDING


@dataclass
class Recording:
    """Answers of one version.

    Attributes:
        answers: by name of the case: fields, which are float64, float32 or int64 tensors on the CPU, or texts.
        tolerances: by name of the case.
        about: what was recorded, for people.
    """

    answers: dict[str, dict[str, Tensor | str]] = field(default_factory=dict)
    tolerances: dict[str, float] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)

    def add(self, cases: Iterable[Case]) -> None:
        """Ask each case in turn, and keep what it answers or the class of the error that it raises.

        Raises:
            ValueError: two cases have one name.
        """
        for case in cases:
            if case.name in self.answers:
                raise ValueError(f"two cases are named {case.name!r}")
            try:
                found = {name: _kept(value) for name, value in case.ask().items() if value is not None}
            except Exception as error:
                found = {RAISED: type(error).__name__}
            self.answers[case.name], self.tolerances[case.name] = found, case.tolerance

    @staticmethod
    def joined(parts: Sequence[Recording]) -> Recording:
        """Return the cases of several recordings of one version."""
        joined = Recording(about=parts[0].about)
        for part in parts:
            joined.answers |= part.answers
            joined.tolerances |= part.tolerances
        return joined

    def save(self, folder: Path) -> None:
        """Write the files of the recording."""
        folder.mkdir(parents=True, exist_ok=True)
        parts: dict[str, list[Tensor]] = {}
        sizes: dict[str, int] = {}
        texts: dict[str, int] = {}
        index: dict[str, Any] = {}
        for name, answer in self.answers.items():
            fields: dict[str, Any] = {}
            index[name] = {"tolerance": self.tolerances[name], "fields": fields}
            for key, value in answer.items():
                if isinstance(value, str):
                    fields[key] = texts.setdefault(value, len(texts))
                    continue
                kind = str(value.dtype).removeprefix("torch.")
                fields[key] = [kind, sizes.get(kind, 0), list(value.shape)]
                parts.setdefault(kind, []).append(value.flatten())
                sizes[kind] = sizes.get(kind, 0) + value.numel()
        save_file({kind: torch.cat(values) for kind, values in parts.items()}, folder / NUMBERS)
        data = {"about": self.about, "texts": list(texts), "cases": index}
        (folder / INDEX).write_text(json.dumps(data, separators=(",", ":")))

    @staticmethod
    def load(folder: Path) -> Recording:
        """Read the files of a recording."""
        data, numbers = json.loads((folder / INDEX).read_text()), load_file(folder / NUMBERS)
        recording = Recording(about=data["about"])
        for name, case in data["cases"].items():
            recording.tolerances[name] = case["tolerance"]
            answer = {key: _read(place, numbers, data["texts"]) for key, place in case["fields"].items()}
            recording.answers[name] = answer
        return recording


def _kept(value: Tensor | str) -> Tensor | str:
    if isinstance(value, str):
        return value
    value = value.detach().cpu().clone()
    if not value.is_floating_point():
        return value.long()
    return value if value.dtype == torch.float64 else value.float()


def _read(place: Any, numbers: Mapping[str, Tensor], texts: list[str]) -> Tensor | str:
    if isinstance(place, int):
        return texts[place]
    kind, start, shape = place
    return numbers[kind][start : start + torch.Size(shape).numel()].view(shape)
