"""The suites of whole models: one row at a time (``single_stream``), batches (``offline``), and newer families."""

from __future__ import annotations

from benchmarks.end_to_end.baselines import PEERS, USUAL
from benchmarks.end_to_end.engines import FAMILY_LAYERS, FUSED_LAYERS
from benchmarks.end_to_end.forced import FAMILY, FULL, NEVER, OWN
from benchmarks.end_to_end.variants import Case
from benchmarks.end_to_end.workloads import Fixed, Sst2

SINGLE_STREAM, OFFLINE, NEWER = "single_stream", "offline", "newer_families"
ONE_AT_HALF, HALF = "all at 50 %", "uniform, 50 %"
BOTH = ("float32", "bfloat16")
RUNTIMES = tuple(sorted(PEERS))
LAYERS = ("all at layer 1", "all at 25 %", ONE_AT_HALF, "all at 75 %", NEVER)
UNIFORM = tuple(f"uniform, {share} %" for share in (39, 23, 18))
MIXED = tuple(f"{mix}, {share} %" for mix in ("uniform", "long tail") for share in (39, 23, 18))
ALIKE = (FULL, NEVER, HALF)
LOOPS = ("mask loop", "truncation")

CASES: dict[str, tuple[Case, ...]] = {
    SINGLE_STREAM: (
        Case("BERT-base", Fixed(1, 32), (FULL, *LAYERS, FAMILY), USUAL, ONE_AT_HALF, BOTH, weight=3),
        Case("BERT-base", Fixed(1, 128), (NEVER, ONE_AT_HALF), RUNTIMES, dtypes=BOTH),
        Case("BERT-base", Fixed(1, 384), (NEVER, ONE_AT_HALF)),
        Case("MiniLM", Fixed(1, 32), LAYERS, RUNTIMES, backends=("auto", "torch")),
        Case("MiniLM", Fixed(1, 128), (NEVER, ONE_AT_HALF)),
        Case("MiniLM", Fixed(1, 384), (NEVER, ONE_AT_HALF)),
        Case("MiniLM", Sst2(1, 48), (NEVER, OWN, HALF), USUAL, OWN, one_by_one=True, weight=3),
    ),
    OFFLINE: (
        Case(
            "BERT-base", Fixed(32, 32), (*ALIKE, *MIXED, "one row stays"), (*LOOPS, *RUNTIMES), HALF, BOTH,
            family_exits=ALIKE,
        ),
        Case("BERT-base", Sst2(32, 1), (NEVER, HALF), ("mask loop", *RUNTIMES), HALF, BOTH),
        *(Case("MiniLM", Fixed(rows, 32), (NEVER, HALF), RUNTIMES) for rows in (4, 64)),
        Case("MiniLM", Fixed(16, 32), (NEVER, HALF), RUNTIMES, backends=("auto", "torch")),
        *(Case("MiniLM", Fixed(8, length), (NEVER, HALF)) for length in (128, 384)),
        Case("MiniLM", Sst2(32, 4), (FULL, NEVER, OWN, HALF), USUAL, OWN),
        Case("ALBERT", Fixed(64, 32), (FULL, NEVER, "uniform, 25 %")),
    ),
    NEWER: tuple(
        Case(name, Fixed(rows, 32), (NEVER, *UNIFORM), engines=engines)
        for name, engines in (("ModernBERT-base", (FAMILY_LAYERS, FUSED_LAYERS)), ("Qwen3-0.6B", (FAMILY_LAYERS,)))
        for rows in (1, 32)
    ),
}  # fmt: skip
