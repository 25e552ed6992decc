"""The suites of whole models: a case is a model, its batches and the variants that are timed together.

``single_stream`` has one row at a time, ``offline`` batches, ``newer_families`` other models, ``stored_weights`` fused
layers by the type in which their weights are stored, beside the runtimes of that arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.end_to_end.baselines import LEAVE_EARLY, PEERS, PLAIN, USUAL
from benchmarks.end_to_end.forced import FAMILY, FULL, NEVER, OWN
from benchmarks.end_to_end.models import FAMILY_LAYERS, FUSED_LAYERS
from benchmarks.end_to_end.peers import ARITHMETIC, BY_DEFAULT, DEFAULT, RUNTIMES
from benchmarks.end_to_end.workloads import Fixed, Sst2, Work
from benchmarks.harness import Variant


@dataclass(frozen=True)
class Case:
    """One model and its batches, with all variants that are timed together.

    Attributes:
        subject: a name of `models.SUBJECTS`.
        work: builds the batches.
        exits: mixes that our engines run, names of `forced`.
        baselines: names of `BASELINES`; the plain model is always there.
        baseline_exits: the mix for the baselines that leave early.
        dtypes: names of `DTYPES`.
        backends: of our engines' ops.
        one_by_one: a timed call answers one batch, the next in turn; otherwise all of them.
        weight: share of the time that the case gets, relative to a usual one.
        family_exits: mixes that our model runs with the family's layers; default: `exits`.
        engines: names of `ENGINES`.
        narrow_baselines: baselines that are timed in other dtypes than float32 too.
        stored: types of the weights of fused layers, in place of the models' dtypes; the plain model is not timed then.
        compared: baselines that our engines are compared with besides the plain model, if both run the same exits or
            the baseline runs all layers.
    """

    subject: str
    work: Work
    exits: tuple[str, ...]
    baselines: tuple[str, ...] = ()
    baseline_exits: str = FULL
    dtypes: tuple[str, ...] = ("float32",)
    backends: tuple[str, ...] = ("auto",)
    one_by_one: bool = False
    weight: float = 1.0
    family_exits: tuple[str, ...] | None = None
    engines: tuple[str, ...] = (FAMILY_LAYERS, FUSED_LAYERS)
    narrow_baselines: tuple[str, ...] = (PLAIN, *PEERS)
    stored: tuple[str, ...] = ()
    compared: tuple[str, ...] = ()


def variants_of(case: Case, dtype: str) -> Iterator[Variant]:
    """Yield the variants of a case in one dtype."""
    family = case.exits if case.family_exits is None else case.family_exits
    for exits in case.exits:
        engines = [name for name in case.engines if name != FAMILY_LAYERS or exits in family]
        for kind in case.stored or (dtype,):
            yield from (Variant(engine, backend, kind, exits) for engine in engines for backend in case.backends)
    for name in case.baselines if case.stored else dict.fromkeys((PLAIN, *case.baselines)):
        if dtype == "float32" or name in case.narrow_baselines:
            yield baseline(name, dtype, case.baseline_exits)


def baseline(name: str, dtype: str, exits: str) -> Variant:
    """Return the variant of a baseline: its own arithmetic if it has one, and all layers unless it runs fewer."""
    return Variant(name, "", ARITHMETIC.get(name, dtype), exits if name in LEAVE_EARLY else FULL)


SINGLE_STREAM, OFFLINE, NEWER, STORED = "single_stream", "offline", "newer_families", "stored_weights"
ONE_AT_HALF, HALF = "all at 50 %", "uniform, 50 %"
BOTH = ("float32", "bfloat16")
LAYERS = ("all at layer 1", "all at 25 %", ONE_AT_HALF, "all at 75 %", NEVER)
UNIFORM = tuple(f"uniform, {share} %" for share in (39, 23, 18))
MIXED = tuple(f"{mix}, {share} %" for mix in ("uniform", "long tail") for share in (39, 23, 18))
ALIKE = (FULL, NEVER, HALF)
LOOPS = ("mask loop", "truncation")
#: Type of stored weights -> largest distance of the logits from the plain model's, over their spread; runtimes by their
#: arithmetic.
WITHIN = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.2, "int8": 0.6, BY_DEFAULT: 0.2}


def half_of(rows: int) -> str:
    """Return the mix whose rows run half of the layers."""
    return ONE_AT_HALF if rows == 1 else HALF


CASES: dict[str, tuple[Case, ...]] = {
    SINGLE_STREAM: (
        Case("BERT-base", Fixed(1, 32), (FULL, *LAYERS, FAMILY), USUAL, ONE_AT_HALF, BOTH, weight=3),
        Case("BERT-base", Fixed(1, 128), (NEVER, ONE_AT_HALF), PEERS, dtypes=BOTH),
        Case("BERT-base", Fixed(1, 384), (NEVER, ONE_AT_HALF)),
        Case("MiniLM", Fixed(1, 32), LAYERS, PEERS, backends=("auto", "torch")),
        Case("MiniLM", Fixed(1, 128), (NEVER, ONE_AT_HALF)),
        Case("MiniLM", Fixed(1, 384), (NEVER, ONE_AT_HALF)),
        Case("MiniLM", Sst2(1, 48), (NEVER, OWN, HALF), USUAL, OWN, one_by_one=True, weight=3),
    ),
    OFFLINE: (
        Case(
            "BERT-base", Fixed(32, 32), (*ALIKE, *MIXED, "one row stays"), (*LOOPS, *PEERS), HALF, BOTH,
            family_exits=ALIKE,
        ),
        Case("BERT-base", Sst2(32, 1), (NEVER, HALF), ("mask loop", *PEERS), HALF, BOTH),
        *(Case("MiniLM", Fixed(rows, 32), (NEVER, HALF), PEERS) for rows in (4, 64)),
        Case("MiniLM", Fixed(16, 32), (NEVER, HALF), PEERS, backends=("auto", "torch")),
        *(Case("MiniLM", Fixed(8, length), (NEVER, HALF)) for length in (128, 384)),
        Case("MiniLM", Sst2(32, 4), (FULL, NEVER, OWN, HALF), USUAL, OWN),
        Case("ALBERT", Fixed(64, 32), (FULL, NEVER, "uniform, 25 %")),
    ),
    NEWER: tuple(
        Case(name, Fixed(rows, 32), (NEVER, *UNIFORM), engines=engines)
        for name, engines in (("ModernBERT-base", (FAMILY_LAYERS, FUSED_LAYERS)), ("Qwen3-0.6B", (FAMILY_LAYERS,)))
        for rows in (1, 32)
    ),
    STORED: tuple(
        Case(
            name, work, (NEVER, ONE_AT_HALF), tuple(RUNTIMES), engines=(FUSED_LAYERS,), weight=3,
            stored=("float32", "float16", "bfloat16", "int8"), compared=(DEFAULT,),
        )
        for name, work in (
            *(("BERT-base", work) for work in (Fixed(1, 32), Fixed(1, 128), Fixed(32, 32), Sst2(32, 1))),
            *(("MiniLM", work) for work in (Fixed(1, 32), Fixed(32, 32))),
        )
    ),
}  # fmt: skip
