"""`compact` and `gather_rows`: the plan of a compaction, and the tokens that it moves.

    python -m pytest benchmarks/micro/bench_compact.py --benchmark-only

Rows have left at random places. The chain is boolean-mask indexing; for the tokens it indexes whole rows, since all
have S tokens. Both sides allocate what they write.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Checked, Implementation
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


@dataclass(frozen=True)
class Case:
    """One op, and which rows are live."""

    op: str
    live: str
    shape: Shape

    def __str__(self) -> str:
        return f"{self.op}-{self.live.replace(' ', '_')}-{self.shape}"


#: A batch of one row is never compacted.
CASES = [
    Case(op, live, shape)
    for op, fields in (("compact", ("rows",)), ("gather_rows", ("rows", "width")))
    for live in LIVE
    for shape in around(*fields)
    if shape.rows > 1
]


def row_ids_with(rows: int, live: int) -> Tensor:
    """Return row ids ``[B]`` int32 of which `live` are live, at random places."""
    left = torch.randperm(rows, generator=torch.Generator().manual_seed(0))[live:]
    row_ids = torch.arange(rows, dtype=torch.int32)
    row_ids[left] = -1
    return row_ids.to(device())


def plain_plan(row_ids: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the live rows, their offsets, and where each came from, in plain torch."""
    live = row_ids >= 0
    lengths = offsets.diff()[live]
    return row_ids[live], F.pad(lengths.cumsum(0), (1, 0)), live.nonzero()[:, 0]


def compact_variants(case: Case) -> dict[str, Implementation]:
    """The plan of a compaction."""
    shape = case.shape
    row_ids = row_ids_with(shape.rows, LIVE[case.live](shape.rows))
    offsets = even_offsets(shape.rows, shape.length, device())
    wanted = [part.tolist() for part in plain_plan(row_ids, offsets)]

    def variant(name: str, call: Callable[[], tuple[Tensor, ...]]) -> Implementation:
        def check() -> Checked:
            found = zip(("row ids", "offsets", "sources"), call(), wanted, strict=True)
            wrong = [part for part, got, want in found if got.tolist()[: len(want)] != want]
            return Checked(f"{', '.join(wrong)} differ" if wrong else "")

        return repeated(name, call, check)

    ops = {name: plain_plan if name == EAGER else raw("compact", name, device()) for name in NAMES}
    return {name: variant(name, functools.partial(op, row_ids, offsets)) for name, op in ops.items()}


def gather_variants(case: Case) -> dict[str, Implementation]:
    """The tokens of the live rows, moved into a second buffer."""
    shape, count = case.shape, LIVE[case.live](case.shape.rows)
    row_ids = row_ids_with(shape.rows, count)
    offsets = even_offsets(shape.rows, shape.length, device())
    _, new_offsets, source = plain_plan(row_ids, offsets)
    new_offsets, source, live = new_offsets.int(), source.int(), row_ids >= 0
    padded = torch.randn(shape.rows, shape.length, shape.width, generator=torch.Generator().manual_seed(0)).to(device())
    hidden = padded.view(-1, shape.width)
    wanted = padded[live].view(-1, shape.width)

    def variant(name: str, call: Callable[[], Tensor]) -> Implementation:
        def check() -> Checked:
            return Checked("" if torch.equal(call().view(-1, shape.width), wanted) else "the tokens differ")

        return repeated(name, call, check)

    def gather(op: Callable[..., None]) -> Tensor:
        out = hidden.new_empty(wanted.shape)
        op(hidden, offsets, source, new_offsets, out)
        return out

    ops = {name: raw("gather_rows", name, device()) for name in NAMES if name != EAGER}
    calls = {name: functools.partial(gather, op) for name, op in ops.items()} | {EAGER: lambda: padded[live]}
    return {name: variant(name, call) for name, call in calls.items()}


OPS = {"compact": compact_variants, "gather_rows": gather_variants}


@functools.lru_cache(maxsize=1)
def variants_of(case: Case) -> dict[str, Implementation]:
    """Return the variants of a case; they are timed one after the other, so those of one case are kept."""
    return OPS[case.op](case)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_compaction(timed, case, name):
    timed(variants_of(case)[name])
