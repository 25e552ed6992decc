"""A mutant: one changed line of a file, and the tests that must fail with it; and the tables of mutants.

A table is a text in which a mutant looks like a part of a diff::

    == earlyexit_kernels/core/loop.py
    tests: core/test_gates.py core/test_counts.py

    loop-gate-of-the-threshold: </<=
    - ~(gate >= self.skip_from)
    + ~(gate > self.skip_from)

Lines with ``-`` are a text that occurs once in the file, not necessarily whole lines; those with ``+`` take its place.
A mutant may have a line ``tests:`` of its own. Tests are arguments of pytest, with paths in python_tests, those that
notice most first. A first word ``triton`` runs them under Triton's interpreter.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "tables"
#: Name and kind of a mutant in a table.
HEADING = re.compile(r"([a-z0-9-]+): (.+)")
TRITON = "triton"


class StaleError(ValueError):
    """The old text of a mutant is not in its file, or not once."""


@dataclass(frozen=True)
class Mutant:
    """One changed line.

    Attributes:
        name: unique.
        file: path in the checkout.
        kind: of fault.
        old, new: lines of the text that occurs once in the file, and of what takes its place.
        tests: that cover it.
    """

    name: str
    file: str
    kind: str
    old: tuple[str, ...]
    new: tuple[str, ...]
    tests: str

    @property
    def is_native(self) -> bool:
        """Return whether the extension has to be built with the mutant; the tests of CUDA kernels compile these."""
        return self.file.startswith("csrc/") and not self.file.startswith("csrc/cuda/")

    @property
    def is_interpreted(self) -> bool:
        """Return whether its tests run under Triton's interpreter."""
        return self.tests.startswith(f"{TRITON} ")

    def applied(self, text: str) -> str:
        """Return the text of the file with the change.

        Raises:
            StaleError: the old text does not occur once.
        """
        old = "\n".join(self.old)
        if (count := text.count(old)) != 1:
            raise StaleError(f"{self.file}: the old text occurs {count} times")
        return text.replace(old, "\n".join(self.new))

    def lines(self, root: Path) -> tuple[str, str]:
        """Return what changes, in whole lines before and after.

        Raises:
            StaleError: the file or the old text is not there.
        """
        path = root / self.file
        if not path.is_file():
            raise StaleError(f"{self.file}: there is no such file")
        before = path.read_text()
        after = self.applied(before)
        old, new = "\n".join(self.old), "\n".join(self.new)
        start = before.index(old)
        return _whole_lines(before, start, len(old)), _whole_lines(after, start, len(new))


def _whole_lines(text: str, start: int, length: int) -> str:
    """Return the lines in which a part of a text lies."""
    end = text.find("\n", start + length)
    return text[text.rfind("\n", 0, start) + 1 : None if end < 0 else end].strip()


def arguments_of(tests: str) -> list[str]:
    """Return covering tests as arguments of pytest in the checkout."""
    return [f"python_tests/{word}" if ".py" in word else word for word in shlex.split(tests) if word != TRITON]


def read_table(path: Path) -> list[Mutant]:
    """Read the mutants of a table.

    Raises:
        ValueError: a line of another form, with its number.
    """
    mutants: list[Mutant] = []
    file = tests = ""
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        sign, text = line[:1], line[2:]
        last = mutants[-1] if mutants and mutants[-1].file == file else None
        if not line or sign == "#":
            continue
        if line.startswith("== "):
            file, tests = line[3:], ""
        elif line.startswith("tests: ") and not tests:
            tests = line.partition(": ")[2]
        elif line.startswith("tests: ") and last is not None:
            mutants[-1] = replace(last, tests=line.partition(": ")[2])
        elif sign == "-" and last is not None:
            mutants[-1] = replace(last, old=(*last.old, text))
        elif sign == "+" and last is not None:
            mutants[-1] = replace(last, new=(*last.new, text))
        elif file and tests and (heading := HEADING.fullmatch(line)):
            mutants.append(Mutant(heading[1], file, heading[2], (), (), tests))
        else:
            raise ValueError(f"{path.name}:{number}: expected a line as in the other tables, got {line!r}")
    return mutants


def all_mutants() -> list[Mutant]:
    """Return the mutants of all tables.

    Raises:
        ValueError: two have the same name.
    """
    mutants = [mutant for path in sorted(FOLDER.glob("*.txt")) for mutant in read_table(path)]
    names = [mutant.name for mutant in mutants]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"mutants: expected distinct names, got {', '.join(twice)} more than once")
    return mutants
