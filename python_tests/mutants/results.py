"""The table of results: one row for each mutant, in a CSV file."""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass, fields
from pathlib import Path

from mutants.mutant import Mutant, StaleError
from mutants.survivors import REASONS

NEEDS_A_TEST = "needs a test"


@dataclass(frozen=True)
class Row:
    """The result of one mutant; all values are text, as in the file.

    Attributes:
        name, file, kind, tests: of the mutant.
        line, mutated: the line before and after.
        result: ``"killed"``, ``"survived"``, ``"stale"`` or ``"error"``.
        by: the first test that failed, or why there is no result.
        seconds: of the tests.
        commit: of the checkout that was measured.
    """

    name: str
    file: str
    kind: str
    line: str
    mutated: str
    result: str
    by: str
    seconds: str
    commit: str
    tests: str

    @staticmethod
    def of(mutant: Mutant, lines: tuple[str, str], result: str, by: str, seconds: str, commit: str) -> Row:
        """Return the row of a mutant."""
        return Row(mutant.name, mutant.file, mutant.kind, *lines, result, by, seconds, commit, mutant.tests)

    @property
    def is_finished(self) -> bool:
        """Return whether the mutant was measured, and needs no test that may have been written since."""
        return self.result == "killed" or self.reason not in ("", NEEDS_A_TEST)

    @property
    def reason(self) -> str:
        """Why the mutant survives, `NEEDS_A_TEST`, or ``""`` for one that does not."""
        return REASONS.get(self.name, NEEDS_A_TEST) if self.result == "survived" else ""


class Results:
    """The rows of a results file, which is written after each.

    Args:
        path: of the file.
        order: names of the mutants, in the order of the rows.
    """

    def __init__(self, path: Path, order: list[str]) -> None:
        self.path = path
        self._order = {name: k for k, name in enumerate(order)}
        self.rows: dict[str, Row] = {}
        if path.is_file():
            with open(path, newline="") as file:
                for read in csv.DictReader(file):
                    row = Row(**{field.name: read[field.name] for field in fields(Row)})
                    if row.name in self._order:
                        self.rows[row.name] = row

    def has(self, mutant: Mutant, root: Path) -> bool:
        """Return whether this mutant, with the line in a checkout and these tests, was measured."""
        row = self.rows.get(mutant.name)
        try:
            wanted = *mutant.lines(root), mutant.tests
        except StaleError:
            return False
        return row is not None and row.is_finished and (row.line, row.mutated, row.tests) == wanted

    def noticed_by(self, name: str) -> str:
        """Return the test that noticed a mutant, or ``""``."""
        row = self.rows.get(name)
        return row.by if row is not None and row.result == "killed" and ".py" in row.by else ""

    def put(self, row: Row) -> None:
        """Add or replace a row, and write the file."""
        self.rows[row.name] = row
        self.write()

    def write(self) -> None:
        """Write the file in one step."""
        names = [field.name for field in fields(Row)]
        new = self.path.with_suffix(".new")
        with open(new, "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*names, "reason"])
            for row in sorted(self.rows.values(), key=lambda row: self._order[row.name]):
                writer.writerow([*(getattr(row, name) for name in names), row.reason])
        os.replace(new, self.path)

    def summary(self) -> str:
        """Return how many mutants there are by result, and the survivors."""
        counts = dict.fromkeys(("killed", "survived", "stale", "error"), 0)
        for row in self.rows.values():
            counts[row.result] += 1
        lines = [", ".join(f"{count} {result}" for result, count in counts.items())]
        others = [row for row in self.rows.values() if row.result != "killed"]
        lines += [f"  {row.result:9} {row.name:32} {row.file}: {row.reason or row.by}" for row in others]
        killed = [row.name for row in self.rows.values() if row.result == "killed" and row.name in REASONS]
        lines += [f"  {name} is killed now; remove its reason from survivors.py" for name in killed]
        return "\n".join(lines)

    @property
    def unexplained(self) -> bool:
        """Return whether a mutant was not measured, or survived without a reason."""
        return not all(row.is_finished for row in self.rows.values())
