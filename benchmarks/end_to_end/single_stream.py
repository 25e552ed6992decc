"""Latency of one row at a time: p50, p90 and p99 against length and exits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.end_to_end.baselines import PEERS, USUAL
from benchmarks.end_to_end.contenders import Case
from benchmarks.end_to_end.forced import FAMILY, FULL, NEVER, OWN
from benchmarks.end_to_end.measure import records as measured
from benchmarks.end_to_end.workloads import Fixed, Sst2

SUITE = "single_stream"
HALF = "all at 50 %"
LAYERS = ("all at layer 1", "all at 25 %", HALF, "all at 75 %", NEVER)
BOTH = ("float32", "bfloat16")
RUNTIMES = tuple(sorted(PEERS))
CASES = (
    Case("BERT-base", Fixed(1, 32), (FULL, *LAYERS, FAMILY), USUAL, HALF, BOTH, weight=3),
    Case("BERT-base", Fixed(1, 128), (NEVER, HALF), RUNTIMES, dtypes=BOTH),
    Case("BERT-base", Fixed(1, 384), (NEVER, HALF)),
    Case("MiniLM", Fixed(1, 32), LAYERS, RUNTIMES, backends=("auto", "torch")),
    Case("MiniLM", Fixed(1, 128), (NEVER, HALF)),
    Case("MiniLM", Fixed(1, 384), (NEVER, HALF)),
    Case("MiniLM", Sst2(1, 48), (NEVER, OWN, "uniform, 50 %"), USUAL, OWN, one_by_one=True, weight=3),
)


def records(repeats: int) -> Iterator[dict[str, Any]]:
    """All cases."""
    return measured(SUITE, CASES, repeats)
