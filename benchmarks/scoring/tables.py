"""The table of `earlyexit score`, from the committed results."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.harness import measured
from benchmarks.tables import NOT_MEASURED
from earlyexit_kernels.tuning.report import markdown_table


def scoring() -> str:
    """Throughput beside that of a plain loop."""
    header = ("rows", "seconds", "rows a second", "plain loop, rows a second", "ratio", "killed at half and resumed")
    rows = []
    for run in measured("scoring"):
        for r in run.records:
            before, after = r["loop_rows_per_second"]
            once = "every row once" if r["every_row_once"] else "rows lost or doubled"
            cells = (
                f"{r['rows']:,}",
                f"{r['seconds']:.0f}",
                f"{r['rows_per_second']:.0f}",
                f"{before:.0f}, {after:.0f}",
            )
            rows.append((*cells, f"{r['ratio']:.2f}", once))
    return markdown_table(header, rows) if rows else NOT_MEASURED


TABLES: dict[str, Callable[[], str]] = {"scoring": scoring}
