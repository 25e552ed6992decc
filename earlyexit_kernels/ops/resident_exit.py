"""One exit of a loop of which the host reads nothing: `exit_step`, and then what becomes of the rows, on the device.

Hidden states lie in a flat buffer of two sides of T tokens each, and the offsets, which count from its beginning, say
which side is live. After the decision the rows still live are planned onto the other side, in order, where that makes
fewer tiles of tokens to compute; `gather_rows` then moves them. Either way the number of tokens present is on the
device, ``offsets[-1] - offsets[0]``, and every kernel of the next layer reads it there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from earlyexit_kernels.backends import jit, tl
from earlyexit_kernels.ops.checks import FLOATS, check_tensor
from earlyexit_kernels.ops.exit_step import exit_step_torch, exit_step_triton
from earlyexit_kernels.ops.schema import RESIDENT_EXIT, define

#: Rows that one program settles; a larger batch is split before.
MOST_ROWS = 1024


@jit
def settle_rows_kernel(
    row_ids,  # [R] int32
    offsets,  # [R + 1] int32
    old_offsets,  # [R + 1] int32
    source,  # [R] int32
    found,  # [3] int32, as exit_step returns them
    counts,  # [4] int32
    rows,  # R
    capacity,  # T
    tile,
    BLOCK: tl.constexpr,
):
    """One program. Everything is loaded before the scans, whose barriers keep the stores after all of it."""
    i = tl.arange(0, BLOCK)
    inside = i < rows
    n = tl.load(row_ids + i, mask=inside, other=-1)
    start = tl.load(offsets + i, mask=inside, other=0)
    end = tl.load(offsets + i + 1, mask=inside, other=0)
    first = tl.load(offsets)
    last = tl.load(offsets + rows)
    live = n >= 0
    keep = live.to(tl.int32)
    length = tl.where(live, end - start, 0)
    slot = tl.cumsum(keep, 0) - keep
    after = tl.cumsum(length, 0)
    live_rows = tl.sum(keep, 0)
    live_tokens = tl.sum(length, 0)
    present = last - first
    tl.debug_barrier()
    if (live_tokens + tile - 1) // tile < (present + tile - 1) // tile:
        base = tl.where(first == 0, capacity, 0)
        beyond = inside & (i >= live_rows)
        tl.store(old_offsets + i + 1, end, mask=inside)
        tl.store(old_offsets, first)
        tl.store(offsets, base)
        tl.store(row_ids + slot, n, mask=live)
        tl.store(source + slot, i, mask=live)
        tl.store(offsets + slot + 1, base + after, mask=live)
        tl.store(row_ids + i, -1, mask=beyond)
        tl.store(source + i, -1, mask=beyond)
        tl.store(offsets + i + 1, base + live_tokens, mask=beyond)
        present = live_tokens
    else:
        tl.store(source + i, -1, mask=inside)
    tl.store(counts, live_rows)
    tl.store(counts + 1, live_tokens)
    tl.store(counts + 2, tl.load(found + 2))
    tl.store(counts + 3, present)


def settle_rows_triton(
    row_ids: Tensor,
    offsets: Tensor,
    old_offsets: Tensor,
    source: Tensor,
    found: Tensor,
    counts: Tensor,
    capacity: int,
    tile: int,
) -> None:
    """Launch `settle_rows_kernel`."""
    rows = row_ids.numel()
    block = max(2, 1 << (rows - 1).bit_length())
    settle_rows_kernel[(1,)](
        row_ids, offsets, old_offsets, source, found, counts, rows, capacity, tile, BLOCK=block, num_warps=4
    )


def settle_rows_torch(
    row_ids: Tensor,
    offsets: Tensor,
    old_offsets: Tensor,
    source: Tensor,
    found: Tensor,
    counts: Tensor,
    capacity: int,
    tile: int,
) -> None:
    """`settle_rows_kernel` in torch, without reading anything on the host."""
    rows = row_ids.numel()
    live = row_ids >= 0
    order = torch.argsort(~live, stable=True)
    beyond = ~live[order]
    lengths = offsets.diff()
    live_tokens = lengths.masked_fill(~live, 0).sum()
    present = offsets[rows] - offsets[0]
    moves = -(-live_tokens // tile) < -(-present // tile)
    base = torch.where(offsets[0] == 0, capacity, 0).to(offsets.dtype)
    moved = torch.cat((base[None], base + lengths[order].masked_fill(beyond, 0).cumsum(0))).to(offsets.dtype)
    old_offsets.copy_(torch.where(moves, offsets, old_offsets))
    source.copy_(torch.where(moves & ~beyond, order, -1))
    row_ids.copy_(torch.where(moves, row_ids[order].masked_fill(beyond, -1), row_ids))
    offsets.copy_(torch.where(moves, moved, offsets))
    counts.copy_(torch.stack((live.sum(), live_tokens, found[2], torch.where(moves, live_tokens, present))))


def _two_steps(step: Callable[..., Tensor], settle: Callable[..., None], whole: bool) -> Callable[..., None]:
    """The op as a decision and a settling, two launches; `whole`: the decision wants offsets that start at 0."""

    def run(
        hidden: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        logits: Tensor | None,
        aux: Tensor | None,
        row_ids: Tensor,
        offsets: Tensor,
        old_offsets: Tensor,
        source: Tensor,
        counts: Tensor,
        state: Tensor,
        answers: Tensor,
        exit_layer: Tensor,
        criterion: str,
        params: Sequence[float],
        pooling: str,
        layer: int,
        depth: int,
        tile: int,
        capacity: int,
        handle: int,
    ) -> None:
        if handle:
            raise ValueError(f"resident_exit: only back-end 'cpp' sets a graph's handle, got {handle}; pass 0")
        if tile < 1:
            raise ValueError(f"resident_exit: expected a tile of 1 token or more, got {tile}")
        read = offsets
        if hidden is not None and pooling != "none":
            check_tensor("resident_exit", "hidden", hidden, (2 * capacity, None), FLOATS)
            if whole:
                hidden, read = hidden[offsets[0] : offsets[-1]], offsets - offsets[0]
        rows = (row_ids, state, answers, exit_layer)
        found = step(hidden, read, weight, bias, logits, aux, *rows, criterion, params, pooling, layer, depth)
        settle(row_ids, offsets, old_offsets, source, found, counts, capacity, tile)

    return run


#: Back-end -> op; ``cpp`` is one launch, on CUDA alone. Its arguments, in order: hidden ``[2 T, H]``, or the features
#: ``[R, F]`` of the exit with pooling "none", and its weight and bias; or None for these and logits ``[R, C]``; aux;
#: row_ids ``[R]``, offsets ``[R + 1]``; old_offsets ``[R + 1]`` and source ``[R]``, which tell gather_rows what moves
#: from where; counts ``[4]``: rows live, their tokens, rows without a meaningful answer, tokens present from now on;
#: state, answers, exit_layer, criterion, params, pooling, layer and depth as in exit_step; tokens of a tile; T; and the
#: conditional handle of a CUDA graph that gets whether rows are live, 0 for none.
RESIDENT_EXITS = define(
    "resident_exit",
    RESIDENT_EXIT,
    implementations={
        "torch": _two_steps(exit_step_torch, settle_rows_torch, True),
        "triton": _two_steps(exit_step_triton, settle_rows_triton, False),
    },
)
