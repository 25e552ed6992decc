"""`exit_step`, `compact` and `gather_rows` beside plain torch, with pytest-benchmark.

    python -m pytest benchmarks/micro/bench_ops.py --benchmark-only -k "entropy and logits"

A case is one op on one input; its variants are the back-ends that can be timed here and the same in plain torch. The
decision is at a middle layer, under entropy or patience, from ready logits or with the pooled linear exit fused; other
criteria are timed by the suite ``decision_cost``. For a compaction rows have left at random places; plain torch indexes
by a boolean mask, for the tokens whole rows, since all have S. Both sides allocate what they write.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Call, Checked, Implementation, Variant
from benchmarks.machine import device, l2_filler, synchronize
from benchmarks.micro.decisions import (
    LAYER,
    Decision,
    even_offsets,
    head_giving,
    middle_settings,
    random_trace,
    untimeable,
)
from benchmarks.micro.plain import STEPS, PlainDecision
from earlyexit_kernels.criteria import Criterion, Patience
from earlyexit_kernels.ops import raw

#: The plain torch chain.
EAGER = "eager"
NAMES = (*(backend for backend, reason in untimeable(device()).items() if not reason), EAGER)
#: Values of a shape beside the base point's.
SWEEPS = {"rows": (1, 8, 128, 1024), "classes": (2, 8, 64), "width": (384, 1024)}
#: Calls in one timing; one on a GPU, whose cache is flushed before it.
CALLS = {"cpu": 4, "cuda": 1}
ROUNDS, WARM_UP = 20, 2
#: Rows of the trace that settings are chosen on, so that they are the same for every batch.
SETTING_ROWS = 256


@dataclass(frozen=True)
class Case:
    """One op on B rows of S tokens, C classes, width H.

    Attributes:
        op: ``"exit_step"``, or a name of `MOVES`.
        what: criterion and source of the logits, or which rows are live, a name of `LIVE`.
    """

    op: str
    what: tuple[str, ...]
    rows: int = 32
    classes: int = 3
    width: int = 768
    length: int = 32

    def __str__(self) -> str:
        words = "-".join(self.what).replace(" ", "_")
        return f"{self.op}-{words}-B{self.rows}-C{self.classes}-H{self.width}-S{self.length}"

    def around(self, *fields: str) -> list[Case]:
        """Return this case, and this case with each other value of some fields."""
        return [self, *(replace(self, **{name: value}) for name in fields for value in SWEEPS[name])]


#: Which rows are live -> how many of B.
LIVE: dict[str, Callable[[int], int]] = {
    "half have left": lambda rows: rows // 2,
    "one has left": lambda rows: rows - 1,
    "one is left": lambda rows: 1,
}


@functools.cache
def rules(classes: int) -> dict[str, Criterion]:
    """Return settings under which some of the rows leave at the middle layer."""
    entropy = middle_settings(random_trace(SETTING_ROWS, classes))["entropy"]
    return {"entropy": entropy, "patience": Patience(patience=LAYER - 2)}


def _repeated(call: Call) -> Call:
    def calls() -> None:
        for _ in range(CALLS[device()]):
            call()

    return calls


def decision(case: Case) -> dict[str, Implementation]:
    """Return the variants of a decision."""
    name, source = case.what
    rule = rules(case.classes)[name]
    trace = random_trace(case.rows, case.classes, device())
    exits = [trace.logits[:, k].contiguous() for k in range(trace.depth)]
    head, inputs = None, (exits[LAYER - 1],)
    if source != "logits":
        head = head_giving(exits[LAYER - 1], case.width, case.length, source)
        inputs = (head.hidden.view(case.rows, case.length, case.width), head.weight, head.bias)
    plain = PlainDecision(rule, exits, source, inputs)

    def fused(backend: str) -> Implementation:
        ours = Decision(rule, trace, backend, CALLS[device()], head)

        def check() -> Checked:
            ours.restore()
            live = int(ours()[0])
            row_ids, _, answers, _ = ours.copies[-1]
            return plain.check(row_ids < 0, live, answers)

        return Implementation(Variant(backend), ours, check, ours.restore)

    eager = Implementation(Variant(EAGER), _repeated(plain))
    return {name: eager if name == EAGER else fused(name) for name in NAMES}


def plain_plan(row_ids: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the live rows, their offsets, and where each came from, in plain torch."""
    live = row_ids >= 0
    return row_ids[live], F.pad(offsets.diff()[live].cumsum(0), (1, 0)), live.nonzero()[:, 0]


def compact_calls(row_ids: Tensor, offsets: Tensor, case: Case) -> dict[str, Call]:
    """Return the plan of a compaction by each variant."""
    ops = {name: plain_plan if name == EAGER else raw("compact", name, device()) for name in NAMES}
    return {name: functools.partial(op, row_ids, offsets) for name, op in ops.items()}


def gather_calls(row_ids: Tensor, offsets: Tensor, case: Case) -> dict[str, Call]:
    """Return the move of the live rows' tokens into a second buffer by each variant."""
    _, new_offsets, source = (part.int() for part in plain_plan(row_ids, offsets))
    padded = torch.randn(case.rows, case.length, case.width, generator=torch.Generator().manual_seed(0)).to(device())
    hidden, live = padded.view(-1, case.width), row_ids >= 0

    def gather(op: Callable[..., None]) -> tuple[Tensor]:
        out = hidden.new_empty(len(source) * case.length, case.width)
        op(hidden, offsets, source, new_offsets, out)
        return (out,)

    ops = {name: functools.partial(gather, raw("gather_rows", name, device())) for name in NAMES if name != EAGER}
    return {**ops, EAGER: lambda: (padded[live].view(-1, case.width),)}


#: Op of a compaction -> the calls of its variants.
MOVES = {"compact": compact_calls, "gather_rows": gather_calls}


def move(case: Case) -> dict[str, Implementation]:
    """Return the variants of an op of a compaction."""
    row_ids = torch.arange(case.rows, dtype=torch.int32)
    left = torch.randperm(case.rows, generator=torch.Generator().manual_seed(0))[LIVE[case.what[0]](case.rows) :]
    row_ids[left] = -1
    calls = MOVES[case.op](row_ids.to(device()), even_offsets(case.rows, case.length, device()), case)
    wanted = calls[EAGER]()

    def check(call: Call) -> Checked:
        # an op may return more places than there are live rows
        same = [torch.equal(got[: len(want)], want.to(got.dtype)) for got, want in zip(call(), wanted, strict=True)]
        return Checked("" if all(same) else f"parts {[n for n, ok in enumerate(same) if not ok]} differ")

    return {
        name: Implementation(Variant(name), _repeated(call), functools.partial(check, call))
        for name, call in calls.items()
    }


@functools.lru_cache(maxsize=1)
def variants_of(case: Case) -> dict[str, Implementation]:
    """Return the variants of a case; they are timed one after the other, so those of one case are kept."""
    return decision(case) if case.op == "exit_step" else move(case)


CASES = [
    *(case for rule in STEPS for case in Case("exit_step", (rule, "logits")).around("rows", "classes")),
    *(Case("exit_step", ("patience", pooling)) for pooling in ("first", "mean")),
    *(
        case
        for pooling in ("first", "mean")
        for case in Case("exit_step", ("entropy", pooling)).around("rows", "classes", "width")
    ),
    # a batch of one row is never compacted
    *(case for live in LIVE for case in Case("compact", (live,)).around("rows") if case.rows > 1),
    *(case for live in LIVE for case in Case("gather_rows", (live,)).around("rows", "width") if case.rows > 1),
]


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    torch.set_flush_denormal(True)
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_op(benchmark: Any, case: Case, name: str) -> None:
    """Check a variant, then time it; on a GPU its L2 cache is flushed before each call."""
    variant = variants_of(case)[name]
    wrong = variant.check().wrong
    assert not wrong, wrong

    def prepare() -> None:
        variant.prepare()
        if device() == "cuda":
            l2_filler("cuda").zero_()
        synchronize()

    def call() -> None:
        variant.call()
        synchronize()

    benchmark.group = benchmark.name.rpartition("-")[0]
    benchmark.pedantic(call, setup=prepare, rounds=ROUNDS, warmup_rounds=WARM_UP)
