"""Throughput of batches: against batch size, length and exits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.end_to_end.baselines import USUAL
from benchmarks.end_to_end.contenders import Case
from benchmarks.end_to_end.forced import FULL, NEVER, OWN
from benchmarks.end_to_end.measure import records as measured
from benchmarks.end_to_end.single_stream import BOTH, RUNTIMES
from benchmarks.end_to_end.workloads import Fixed, Sst2

SUITE = "offline"
HALF = "uniform, 50 %"
MIXED = tuple(f"{mix}, {share} %" for mix in ("uniform", "long tail") for share in (39, 23, 18))
ALIKE = (FULL, NEVER, HALF)
CASES = (
    Case(
        "BERT-base",
        Fixed(32, 32),
        (*ALIKE, *MIXED, "one row stays"),
        ("mask loop", "truncation", *RUNTIMES),
        HALF,
        BOTH,
        family_exits=ALIKE,
    ),
    Case("BERT-base", Sst2(32, 1), (NEVER, HALF), ("mask loop", *RUNTIMES), HALF, BOTH),
    *(Case("MiniLM", Fixed(rows, 32), (NEVER, HALF), RUNTIMES) for rows in (4, 64)),
    Case("MiniLM", Fixed(16, 32), (NEVER, HALF), RUNTIMES, backends=("auto", "torch")),
    *(Case("MiniLM", Fixed(8, length), (NEVER, HALF)) for length in (128, 384)),
    Case("MiniLM", Sst2(32, 4), (FULL, NEVER, OWN, HALF), USUAL, OWN),
)


def records(repeats: int) -> Iterator[dict[str, Any]]:
    """All cases."""
    return measured(SUITE, CASES, repeats)
