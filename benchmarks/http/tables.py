"""The tables of the HTTP server, from the committed results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.harness import Record, measured
from benchmarks.http.names import FULL
from benchmarks.tables import NOT_MEASURED
from earlyexit_kernels.tuning.report import markdown_table


def _records(part: str) -> list[Record]:
    return [record for run in measured("http") for record in run.records if record["part"] == part]


def overhead() -> str:
    """One client, one text at a time."""
    found = _records("overhead")
    header = ("one client", "p50, ms", "p99, ms", "p50 less the model, ms")
    rows = [(r["server"], f"{r['p50_ms']:.2f}", f"{r['p99_ms']:.2f}", f"{r['overhead_ms']:.2f}") for r in found]
    return markdown_table(header, rows) if rows else NOT_MEASURED


def arrivals() -> str:
    """Poisson arrivals."""
    found = _records("arrivals")
    full = {r["load"]: r for r in found if r["server"] == FULL}
    rows: list[tuple[Any, ...]] = []
    for r in sorted(found, key=lambda r: r["load"]):
        plain = full[r["load"]]
        ratios = [f"{r[name] / plain[name]:.2f}" for name in ("p50_ms", "p99_ms")]
        cells = [f"{r[name]:.1f}" for name in ("p50_ms", "p90_ms", "p99_ms")]
        rows.append((r["load"], f"{r['rate']:.0f}", r["server"], *cells, *ratios, r["refused"]))
    header = (
        "load",
        "texts a second",
        "server",
        "p50, ms",
        "p90, ms",
        "p99, ms",
        "p50, ratio",
        "p99, ratio",
        "refused",
    )
    return markdown_table(header, rows) if rows else NOT_MEASURED


def users() -> str:
    """Users of locust."""
    header = ("users", "server", "answers a second", "p50, ms", "p99, ms", "failures")
    rows = [
        (r["users"], r["server"], f"{r['answers_per_second']:.0f}", f"{r['p50_ms']:.0f}", f"{r['p99_ms']:.0f}",
         r["failures"])
        for r in _records("users")
    ]  # fmt: skip
    return markdown_table(header, rows) if rows else NOT_MEASURED


TABLES: dict[str, Callable[[], str]] = {"http_overhead": overhead, "http_arrivals": arrivals, "http_users": users}
