"""The suites of whole models: a case is a model, its batches and the variants that are timed together.

``single_stream`` has one row at a time, ``offline`` batches, ``newer_families`` other models, ``stored_weights`` fused
layers by the type in which their weights are stored, beside the runtimes of that arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from benchmarks.end_to_end.baselines import LEAVE_EARLY, PEERS, PLAIN, TRUNCATION, USUAL
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
        variants: of `ours` and `beside`; the dtype of one is the model's, unless weights are stored.
        weight: share of the time that the case gets, relative to a usual one.
        one_by_one: a timed call answers one batch, the next in turn; otherwise all of them.
        stored: whether the dtypes of our variants are those of the stored weights of a float32 model.
        compared: baselines that our engines are compared with besides the plain model, if both run the same exits or
            the baseline runs all layers.
    """

    subject: str
    work: Work
    variants: tuple[Variant, ...]
    weight: float = 1.0
    one_by_one: bool = False
    stored: bool = False
    compared: tuple[str, ...] = ()

    def by_dtype(self) -> dict[str, list[Variant]]:
        """Return dtype of the model -> its variants."""
        found: dict[str, list[Variant]] = {}
        for variant in self.variants:
            found.setdefault("float32" if self.stored else variant.dtype, []).append(variant)
        return found


def ours(
    *exits: str,
    engines: tuple[str, ...] = (FAMILY_LAYERS, FUSED_LAYERS),
    backends: tuple[str, ...] = ("auto",),
    dtypes: tuple[str, ...] = ("float32",),
) -> tuple[Variant, ...]:
    """Return our engines under mixes of exits, names of `forced`."""
    every = product(dtypes, exits, engines, backends)
    return tuple(Variant(engine, backend, dtype, mix) for dtype, mix, engine, backend in every)


def beside(*names: str, exits: str = FULL, dtypes: tuple[str, ...] = ("float32",)) -> tuple[Variant, ...]:
    """Return baselines, names of `BASELINES`; those that leave early do so under a mix of exits."""
    return tuple(baseline(name, dtype, exits) for dtype in dtypes for name in names)


def baseline(name: str, dtype: str, exits: str) -> Variant:
    """Return the variant of a baseline: its own arithmetic if it has one, and all layers unless it runs fewer."""
    return Variant(name, "", ARITHMETIC.get(name, dtype), exits if name in LEAVE_EARLY else FULL)


SINGLE_STREAM, OFFLINE, NEWER, STORED = "single_stream", "offline", "newer_families", "stored_weights"
ONE_AT_HALF, HALF = "all at 50 %", "uniform, 50 %"
BOTH, NARROW = ("float32", "bfloat16"), ("bfloat16",)
LAYERS = ("all at layer 1", "all at 25 %", ONE_AT_HALF, "all at 75 %", NEVER)
UNIFORM = tuple(f"uniform, {share} %" for share in (39, 23, 18))
MIXED = (*UNIFORM, *(f"long tail, {share} %" for share in (39, 23, 18)))
ALIKE = (FULL, NEVER, HALF)
#: The plain model and the other runtimes.
PLAIN_AND_PEERS = (PLAIN, *PEERS)
TYPES = ("float32", "float16", "bfloat16", "int8")
#: Type of stored weights -> largest distance of the logits from the plain model's, over their spread; runtimes by their
#: arithmetic.
WITHIN = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.2, "int8": 0.6, BY_DEFAULT: 0.2}


def half_of(rows: int) -> str:
    """Return the mix whose rows run half of the layers."""
    return ONE_AT_HALF if rows == 1 else HALF


CASES: dict[str, tuple[Case, ...]] = {
    SINGLE_STREAM: (
        Case(
            "BERT-base", Fixed(1, 32), weight=3,
            variants=(
                *ours(FULL, *LAYERS, FAMILY, dtypes=BOTH), *beside(*USUAL, exits=ONE_AT_HALF),
                *beside(*PLAIN_AND_PEERS, dtypes=NARROW),
            ),
        ),
        Case(
            "BERT-base", Fixed(1, 128),
            (*ours(NEVER, ONE_AT_HALF, dtypes=BOTH), *beside(*PLAIN_AND_PEERS, dtypes=BOTH)),
        ),
        Case("BERT-base", Fixed(1, 384), (*ours(NEVER, ONE_AT_HALF), *beside(PLAIN))),
        Case("MiniLM", Fixed(1, 32), (*ours(*LAYERS, backends=("auto", "torch")), *beside(*PLAIN_AND_PEERS))),
        *(Case("MiniLM", Fixed(1, n), (*ours(NEVER, ONE_AT_HALF), *beside(PLAIN))) for n in (128, 384)),
        Case("MiniLM", Sst2(1, 48), (*ours(NEVER, OWN, HALF), *beside(*USUAL, exits=OWN)), 3, one_by_one=True),
    ),
    OFFLINE: (
        Case(
            "BERT-base", Fixed(32, 32),
            (
                *ours(*ALIKE, engines=(FAMILY_LAYERS,), dtypes=BOTH),
                *ours(*ALIKE, *MIXED, "one row stays", engines=(FUSED_LAYERS,), dtypes=BOTH),
                *beside(PLAIN, "mask loop", TRUNCATION, *PEERS, exits=HALF),
                *beside(*PLAIN_AND_PEERS, dtypes=NARROW),
            ),
        ),
        Case(
            "BERT-base", Sst2(32, 1),
            (
                *ours(NEVER, HALF, dtypes=BOTH), *beside(PLAIN, "mask loop", *PEERS, exits=HALF),
                *beside(*PLAIN_AND_PEERS, dtypes=NARROW),
            ),
        ),
        *(Case("MiniLM", Fixed(n, 32), (*ours(NEVER, HALF), *beside(*PLAIN_AND_PEERS))) for n in (4, 64)),
        Case("MiniLM", Fixed(16, 32), (*ours(NEVER, HALF, backends=("auto", "torch")), *beside(*PLAIN_AND_PEERS))),
        *(Case("MiniLM", Fixed(8, n), (*ours(NEVER, HALF), *beside(PLAIN))) for n in (128, 384)),
        Case("MiniLM", Sst2(32, 4), (*ours(FULL, NEVER, OWN, HALF), *beside(*USUAL, exits=OWN))),
        Case("ALBERT", Fixed(64, 32), (*ours(FULL, NEVER, "uniform, 25 %"), *beside(PLAIN))),
    ),
    NEWER: tuple(
        Case(name, Fixed(rows, 32), (*ours(NEVER, *UNIFORM, engines=engines), *beside(PLAIN)))
        for name, engines in (("ModernBERT-base", (FAMILY_LAYERS, FUSED_LAYERS)), ("Qwen3-0.6B", (FAMILY_LAYERS,)))
        for rows in (1, 32)
    ),
    STORED: tuple(
        Case(
            name, work, (*ours(NEVER, ONE_AT_HALF, engines=(FUSED_LAYERS,), dtypes=TYPES), *beside(*RUNTIMES)), 3,
            stored=True, compared=(DEFAULT,),
        )
        for name, work in (
            *(("BERT-base", work) for work in (Fixed(1, 32), Fixed(1, 128), Fixed(32, 32), Sst2(32, 1))),
            *(("MiniLM", work) for work in (Fixed(1, 32), Fixed(32, 32))),
        )
    ),
}  # fmt: skip
