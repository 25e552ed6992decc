"""Report of a run: its findings with the commands to replay them, and a table of the targets."""

from __future__ import annotations

import re
from collections.abc import Mapping

from fuzz.driver import Run
from fuzz.targets import Target
from fuzz.worker import Finding

KINDS = {"wrong": "wrong", "crash": "crashes", "traceback": "tracebacks", "accepted": "silent acceptances"}
#: Maximum replay commands for findings that differ in values only.
MAX_LINES = 5


def table(targets: Mapping[str, Target], run: Run) -> str:
    """Return a table of cases, calls, seconds and findings of each target."""
    header = ("target", "cases", "calls", "seconds", *KINDS.values())
    rows = [
        (
            *(name, run.cases[name], run.calls[name], round(run.seconds[name])),
            *(run.counted.get((name, kind), 0) for kind in KINDS),
        )
        for name in targets
    ]
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    return "\n".join(lines)


def group_key(finding: Finding) -> tuple[str, str, str]:
    """Return a key that is equal for findings that differ in values only."""
    first = finding.message.partition("\n")[0]
    plain = re.sub(r"'[^']*'|\"[^\"]*\"", "'...'", first)
    return finding.target, finding.kind, re.sub(r"-?\b\d[\d.e+-]*|\bnan\b|\binf\b", "#", plain)[:160]


def findings(run: Run, seed: int) -> str:
    """Return the findings by group: one message and the commands to replay its cases."""
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in run.findings:
        groups.setdefault(group_key(finding), []).append(finding)
    blocks = []
    for group in groups.values():
        first = group[0]
        lines = [
            f"  python -m python_tests.fuzz --seed {seed} --replay {f.target}:{f.number}" for f in group[:MAX_LINES]
        ]
        more = f"  and {len(group) - MAX_LINES} more such cases" if len(group) > MAX_LINES else ""
        blocks.append("\n".join([f"{first.target}, {first.kind}: {first.message}", *lines, *([more] if more else [])]))
    return "\n\n".join(blocks)
