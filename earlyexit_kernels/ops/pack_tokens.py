"""The tokens of a batch, packed on the device: padding is left out, and the host reads nothing.

    ids [R, S] -> ids [T] of the tokens kept, their positions and types, offsets [R + 1] and row ids [R]

A row without any token keeps its first, as in `packing.pack`. What lies beyond the tokens kept stays as it was.
"""

from __future__ import annotations

import torch
from torch import Tensor

from earlyexit_kernels.backends import jit, tl
from earlyexit_kernels.ops.schema import PACK_TOKENS, PYTHON_BACK_ENDS, define

#: Columns that a program looks at together.
MOST_COLUMNS = 1024


@jit
def kept_tokens(batch, mask, c, row, width):
    """Which columns of a row are tokens to keep, as 0 and 1."""
    inside = c < tl.load(batch + 1)
    given = tl.load(batch + 2)
    value = tl.load(mask + row.to(tl.int64) * width + c, mask=inside, other=0)
    return tl.where(inside, (value != 0).to(tl.int32) | (1 - given), 0)


@jit
def count_tokens_kernel(
    batch,  # [5] int32
    mask,  # [R, S] int64
    found,  # [2, R] int32: tokens kept of each row, and whether its first is one
    rows,  # R
    width,  # S
    BLOCK: tl.constexpr,
):
    """One program a row."""
    row = tl.program_id(0)
    end = tl.where(row < tl.load(batch), tl.load(batch + 1), 0)
    i = tl.arange(0, BLOCK)
    total = row * 0
    first = row * 0
    start = row * 0
    while start < end:
        keep = kept_tokens(batch, mask, start + i, row, width)
        first += tl.sum(tl.where(start + i == 0, keep, 0), 0)
        total += tl.sum(keep, 0)
        start += BLOCK
    tl.store(found + row, total)
    tl.store(found + rows + row, first)


@jit
def pack_tokens_kernel(
    batch,  # [5] int32
    ids,  # [R, S] int64
    mask,  # [R, S] int64
    positions,  # [R, S] int64
    types,  # [R, S] int64
    found,  # [2, R] int32, as count_tokens_kernel leaves it
    row_ids,  # [R] int32
    offsets,  # [R + 1] int32
    tokens,  # [3, T] int64: ids, positions, types
    counts,  # [4] int32
    rows,  # R
    width,  # S
    capacity,  # T
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """One program a row, which adds up the rows before it."""
    row = tl.program_id(0)
    real = tl.load(batch)
    end = tl.where(row < real, tl.load(batch + 1), 0)
    has_positions = tl.load(batch + 3)
    has_types = tl.load(batch + 4)
    j = tl.arange(0, BLOCK_ROWS)
    total = tl.load(found + j, mask=j < real, other=0)
    length = tl.where(j < real, tl.maximum(total, 1), 0)
    own = tl.sum(tl.where(j == row, total, 0), 0)
    place = tl.sum(tl.where(j < row, length, 0), 0)
    tl.store(row_ids + row, tl.where(row < real, row, -1))
    tl.store(offsets + row + 1, place + tl.where(row < real, tl.maximum(own, 1), 0))
    if row == 0:
        first = tl.load(found + rows + j, mask=j < real, other=1)
        tl.store(offsets, 0)
        tl.store(counts, real)
        tl.store(counts + 1, tl.sum(length, 0))
        tl.store(counts + 2, tl.sum(((first == 0) & (total > 0)).to(tl.int32), 0))
        tl.store(counts + 3, tl.sum(length, 0))
    i = tl.arange(0, BLOCK)
    start = row * 0
    while start < end:
        c = start + i
        keep = kept_tokens(batch, mask, c, row, width) | ((c == 0).to(tl.int32) & (own == 0).to(tl.int32))
        kept = keep > 0
        to = tokens + place + tl.cumsum(keep, 0) - keep
        at = row.to(tl.int64) * width + c
        tl.store(to, tl.load(ids + at, mask=kept, other=0), mask=kept)
        given = tl.load(positions + at, mask=kept, other=0)
        tl.store(to + capacity, tl.where(has_positions > 0, given, c), mask=kept)
        tl.store(to + 2 * capacity, tl.load(types + at, mask=kept, other=0) * has_types, mask=kept)
        place += tl.sum(keep, 0)
        start += BLOCK


def pack_tokens_triton(
    batch: Tensor,
    ids: Tensor,
    mask: Tensor,
    positions: Tensor,
    types: Tensor,
    found: Tensor,
    row_ids: Tensor,
    offsets: Tensor,
    tokens: Tensor,
    counts: Tensor,
) -> None:
    """Launch `count_tokens_kernel` and `pack_tokens_kernel`."""
    rows, width = ids.shape
    block = min(MOST_COLUMNS, 1 << (width - 1).bit_length())
    warps = max(1, min(4, block // 128))
    count_tokens_kernel[(rows,)](batch, mask, found, rows, width, BLOCK=block, num_warps=warps)
    pack_tokens_kernel[(rows,)](
        batch, ids, mask, positions, types, found, row_ids, offsets, tokens, counts, rows, width, tokens.shape[1],
        BLOCK=block, BLOCK_ROWS=1 << (rows - 1).bit_length(), num_warps=4,
    )  # fmt: skip


def pack_tokens_torch(
    batch: Tensor,
    ids: Tensor,
    mask: Tensor,
    positions: Tensor,
    types: Tensor,
    found: Tensor,
    row_ids: Tensor,
    offsets: Tensor,
    tokens: Tensor,
    counts: Tensor,
) -> None:
    """The same in torch, the reference of the other back-end; it reads the batch's size."""
    n, s, has_mask, has_positions, has_types = batch.tolist()
    rows = torch.arange(ids.shape[0], device=ids.device)
    keep = torch.zeros(ids.shape, dtype=torch.bool, device=ids.device)
    keep[:n, :s] = mask[:n, :s] != 0 if has_mask else True
    found[0], found[1] = keep.sum(dim=1), keep[:, 0]
    keep[:n, 0] |= found[0, :n] == 0
    row_ids.copy_(torch.where(rows < n, rows, -1))
    offsets[0] = 0
    offsets[1:] = keep.sum(dim=1).cumsum(0)
    kept = offsets[-1]
    columns = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    values = (ids, positions if has_positions else columns, types if has_types else torch.zeros_like(types))
    tokens[:, : int(kept)] = torch.stack([x[keep] for x in values])
    counts.copy_(torch.stack((batch[0], kept, ((found[0, :n] > 0) & (found[1, :n] == 0)).sum(), kept)))


#: Back-end -> op. Its arguments, in order: batch ``[5]`` int32, which holds the rows and the longest of them, and
#: whether there is a mask, positions and types; ids, mask, positions and types ``[R, S]`` int64, of which only what the
#: batch has is read (positions by column and type 0 where there are none); then what is written: found ``[2, R]``,
#: row_ids ``[R]`` (-1 where there is no row), offsets ``[R + 1]``, tokens ``[3, T]`` int64 (ids, positions, types), and
#: counts ``[4]``: rows, their tokens, rows whose first token is masked though they have others, their tokens again.
PACK_TOKENS_OPS = define(
    "pack_tokens",
    PACK_TOKENS,
    implementations={"torch": pack_tokens_torch, "triton": pack_tokens_triton},
    back_ends=PYTHON_BACK_ENDS,
)
