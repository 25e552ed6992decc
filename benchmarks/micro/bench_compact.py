"""`compact` and `gather_rows`: the plan of a compaction, and the tokens it moves.

    python -m pytest benchmarks/micro/bench_compact.py --benchmark-only

Rows have left at random places. The chain is boolean-mask indexing; for the tokens it indexes whole rows, which it may
since none is shorter than S here. Both sides allocate what they write.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.micro import measure
from benchmarks.micro.decisions import even_offsets, nbytes
from benchmarks.micro.measure import BASE, COMPILED, COPY, EAGER, Group, Shape, Way, around, repeated
from earlyexit_kernels.ops import compact, compaction_ops

#: Which rows are left -> how many of B are live.
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
        return f"{self.op}-{self.live.replace(' ', '_')}-{self.shape.slug}"

    @property
    def is_compiled(self) -> bool:
        """Compiling takes seconds a shape."""
        return self.live == "half have left" and self.shape == BASE


#: One row is never compacted: it is live, or the batch is done.
CASES = [
    Case(op, live, shape)
    for op, fields in (("compact", ("rows",)), ("gather_rows", ("rows", "width")))
    for live in LIVE
    for shape in around(*fields)
    if shape.rows > 1
]


def rows_left(rows: int, live: int) -> Tensor:
    """Row ids ``[B]`` int32 of which `live` are live, at random places."""
    left = torch.randperm(rows, generator=torch.Generator().manual_seed(0))[live:]
    row_ids = torch.arange(rows, dtype=torch.int32)
    row_ids[left] = -1
    return row_ids.to(measure.DEVICE)


def plan(row_ids: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`compact` as a user writes it: the live rows, their offsets, where each came from."""
    live = row_ids >= 0
    lengths = offsets.diff()[live]
    return row_ids[live], F.pad(lengths.cumsum(0), (1, 0)), live.nonzero()[:, 0]


def planned(row_ids: Sequence[int], offsets: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """The same in a loop, the reference."""
    source = [i for i, n in enumerate(row_ids) if n >= 0]
    ends = [0]
    for i in source:
        ends.append(ends[-1] + offsets[i + 1] - offsets[i])
    return [row_ids[i] for i in source], ends, source


PLANNED = ("row ids", "offsets", "sources")


def compact_group(case: Case) -> Group:
    """The plan of a compaction."""
    shape = case.shape
    row_ids = rows_left(shape.rows, LIVE[case.live](shape.rows))
    offsets = even_offsets(shape.rows, shape.length, measure.DEVICE)
    wanted = planned(row_ids.tolist(), offsets.tolist())
    moved = nbytes(row_ids, offsets, row_ids, offsets, row_ids)
    calls = measure.calls_for(moved)

    def way(call: Callable[[], tuple[Tensor, ...]]) -> Way:
        def difference() -> str:
            found = [x.tolist() for x in call()]
            wrong = [name for name, got, want in zip(PLANNED, found, wanted, strict=True) if got[: len(want)] != want]
            return f"{', '.join(wrong)} differ" if wrong else ""

        return Way(repeated(call, calls), difference)

    def fused(backend: str) -> Way:
        bare = compaction_ops(backend, row_ids.device.type)[0]
        return way(lambda: bare(row_ids, offsets))

    ways = {backend: fused(backend) for backend in measure.TIMED}
    ways |= {EAGER: way(lambda: plan(row_ids, offsets)), COPY: measure.copying(moved, calls)}
    if case.is_compiled:
        compiled = measure.compiled(plan)
        ways[COMPILED] = way(lambda: compiled(row_ids, offsets))
    return Group("compact", case.live, shape, moved, calls, ways, {"live": len(wanted[0])})


def masked(padded: Tensor, live: Tensor) -> Tensor:
    """`gather_rows` as a user writes it, on padded tokens ``[B, S, H]``."""
    return padded[live]


def gather_group(case: Case) -> Group:
    """The tokens of the live rows, moved into a second buffer."""
    shape = case.shape
    count = LIVE[case.live](shape.rows)
    row_ids = rows_left(shape.rows, count)
    offsets = even_offsets(shape.rows, shape.length, measure.DEVICE)
    _, new_offsets, source = (x[: count + 1] for x in compact(row_ids, offsets, backend="torch"))
    source = source[:count]
    live = row_ids >= 0
    padded = torch.randn(shape.rows, shape.length, shape.width, generator=torch.Generator().manual_seed(0))
    padded = padded.to(measure.DEVICE)
    hidden = padded.view(-1, shape.width)
    wanted = torch.cat([padded[i] for i in source.tolist()])
    moved = nbytes(wanted, wanted, source, new_offsets) + 4 * (count + 1)
    calls = measure.calls_for(moved)

    def way(call: Callable[[], Tensor]) -> Way:
        def difference() -> str:
            return "" if torch.equal(call().view(-1, shape.width), wanted) else "the tokens differ"

        return Way(repeated(call, calls), difference)

    def fused(backend: str) -> Way:
        bare = compaction_ops(backend, hidden.device.type)[1]

        def gather() -> Tensor:
            out = hidden.new_empty(wanted.shape)
            bare(hidden, offsets, source, new_offsets, out)
            return out

        return way(gather)

    ways = {backend: fused(backend) for backend in measure.TIMED}
    ways |= {EAGER: way(lambda: masked(padded, live)), COPY: measure.copying(moved, calls)}
    if case.is_compiled:
        compiled = measure.compiled(masked)
        ways[COMPILED] = way(lambda: compiled(padded, live))
    return Group("gather_rows", case.live, shape, moved, calls, ways, {"live": count})


GROUPS = {"compact": compact_group, "gather_rows": gather_group}


@functools.lru_cache(maxsize=1)
def group_of(case: Case) -> Group:
    """The ways of one case; they are timed one after the other, so one group is kept."""
    return GROUPS[case.op](case)


@pytest.mark.parametrize(
    ("case", "way"),
    [
        pytest.param(case, way, id=f"{case}-{way}")
        for case in CASES
        for way in measure.ways_of(*([COMPILED] if case.is_compiled else []))
    ],
)
def test_compaction(timed, case, way):
    timed(group_of(case), way)
