"""`compact` and `gather_rows`: the plan of a compaction, and the tokens that it moves.

    python -m pytest benchmarks/micro/bench_compact.py --benchmark-only

Rows have left at random places. The chain is boolean-mask indexing; for the tokens it indexes whole rows, since all
have S tokens. Both sides allocate what they write.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Call, Checked, Implementation
from benchmarks.machine import device
from benchmarks.micro.decisions import even_offsets
from benchmarks.micro.shapes import EAGER, NAMES, Shape, around, repeated
from earlyexit_kernels.ops import raw

#: Which rows are live -> how many of B.
LIVE: dict[str, Callable[[int], int]] = {
    "half have left": lambda rows: rows // 2,
    "one has left": lambda rows: rows - 1,
    "one is left": lambda rows: 1,
}


class Case(NamedTuple):
    """One op, and which rows are live."""

    op: str
    live: str
    shape: Shape

    def __str__(self) -> str:
        return f"{self.op}-{self.live.replace(' ', '_')}-{self.shape}"


def row_ids_with(rows: int, live: int) -> Tensor:
    """Return row ids ``[B]`` int32 of which `live` are live, at random places."""
    left = torch.randperm(rows, generator=torch.Generator().manual_seed(0))[live:]
    row_ids = torch.arange(rows, dtype=torch.int32)
    row_ids[left] = -1
    return row_ids.to(device())


def plain_plan(row_ids: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the live rows, their offsets, and where each came from, in plain torch."""
    live = row_ids >= 0
    return row_ids[live], F.pad(offsets.diff()[live].cumsum(0), (1, 0)), live.nonzero()[:, 0]


def compact_calls(row_ids: Tensor, offsets: Tensor, shape: Shape) -> dict[str, Call]:
    """Return the plan of a compaction by each variant."""
    ops = {name: plain_plan if name == EAGER else raw("compact", name, device()) for name in NAMES}
    return {name: functools.partial(op, row_ids, offsets) for name, op in ops.items()}


def gather_calls(row_ids: Tensor, offsets: Tensor, shape: Shape) -> dict[str, Call]:
    """Return the move of the live rows' tokens into a second buffer by each variant."""
    _, new_offsets, source = (part.int() for part in plain_plan(row_ids, offsets))
    padded = torch.randn(shape.rows, shape.length, shape.width, generator=torch.Generator().manual_seed(0)).to(device())
    hidden, live = padded.view(-1, shape.width), row_ids >= 0

    def gather(op: Callable[..., None]) -> tuple[Tensor]:
        out = hidden.new_empty(len(source) * shape.length, shape.width)
        op(hidden, offsets, source, new_offsets, out)
        return (out,)

    ops = {name: raw("gather_rows", name, device()) for name in NAMES if name != EAGER}
    plain = {EAGER: lambda: (padded[live].view(-1, shape.width),)}
    return {name: functools.partial(gather, op) for name, op in ops.items()} | plain


#: Op -> the calls of its variants, and the fields of the shapes that it is timed on.
OPS = {"compact": (compact_calls, ("rows",)), "gather_rows": (gather_calls, ("rows", "width"))}
#: A batch of one row is never compacted.
CASES = [
    Case(op, live, shape)
    for op, (_, fields) in OPS.items()
    for live in LIVE
    for shape in around(*fields)
    if shape.rows > 1
]


@functools.lru_cache(maxsize=1)
def variants_of(case: Case) -> dict[str, Implementation]:
    """Return the variants of a case; they are timed one after the other, so those of one case are kept."""
    row_ids = row_ids_with(case.shape.rows, LIVE[case.live](case.shape.rows))
    calls = OPS[case.op][0](row_ids, even_offsets(case.shape.rows, case.shape.length, device()), case.shape)
    wanted = calls[EAGER]()

    def check(call: Call) -> Checked:
        # an op may return more places than there are live rows
        same = [torch.equal(got[: len(want)], want.to(got.dtype)) for got, want in zip(call(), wanted, strict=True)]
        return Checked("" if all(same) else f"parts {[n for n, ok in enumerate(same) if not ok]} differ")

    return {name: repeated(name, call, functools.partial(check, call)) for name, call in calls.items()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_compaction(timed, case, name):
    timed(variants_of(case)[name])
