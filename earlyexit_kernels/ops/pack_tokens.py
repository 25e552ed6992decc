"""Packing of the tokens of a batch on the device, without synchronisation.

    ids [R, S] -> ids [T] of the kept tokens, their positions, types and columns, offsets [R + 1] and row ids [R]

A row without any token keeps its first one, as in `packing.pack`. The buffer beyond the kept tokens is not written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from earlyexit_kernels.backends import jit, tl
from earlyexit_kernels.ops.checks import INT32, INT64, check_apart, check_tensor, not_traced
from earlyexit_kernels.ops.schema import PACK_TOKENS, bare_op, define

#: Maximum number of columns per step of a program.
MAX_COLUMNS = 1024


@jit
def kept_tokens(batch, mask, c, row, width):
    """Return which columns of a row are kept, as 0 and 1."""
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
    """One program per row."""
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
    tokens,  # [4, T] int64: ids, positions, types, columns
    counts,  # [4] int32
    rows,  # R
    width,  # S
    capacity,  # T
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """One program per row, which sums the lengths of the rows before it."""
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
        tl.store(to + 3 * capacity, c, mask=kept)
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
    block = min(MAX_COLUMNS, 1 << (width - 1).bit_length())
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
    """`pack_tokens` in torch, the reference of the Triton back-end; synchronises to read the size of the batch."""
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
    values = (ids, positions if has_positions else columns, types if has_types else torch.zeros_like(types), columns)
    tokens[:, : int(kept)] = torch.stack([x[keep] for x in values])
    counts.copy_(torch.stack((batch[0], kept, ((found[0, :n] > 0) & (found[1, :n] == 0)).sum(), kept)))


define("pack_tokens", PACK_TOKENS, implementations={"torch": pack_tokens_torch, "triton": pack_tokens_triton})


def pack_tokens(
    *,
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
    backend: str = "auto",
) -> None:
    """Pack the tokens of a batch into buffers of fixed size, without synchronisation on CUDA.

    Args:
        batch: ``[5]`` int32: number of rows N <= R, padded length <= S, and whether there are a mask, positions and
            types (0 or 1).
        ids, mask, positions, types: ``[R, S]`` int64, of which the first N rows are read. A nonzero mask keeps a token;
            without a mask all are kept, without positions they are the columns, without types the type is 0.
        found: ``[2, R]`` int32. **Changed** to the kept tokens of each row, and whether its first token is one of them.
        row_ids: ``[R]`` int32. **Changed** to 0 .. N - 1, then -1.
        offsets: ``[R + 1]`` int32. **Changed** to those of the packed rows.
        tokens: ``[4, T]`` int64, T at least R S. **Changed**: ids, positions, types and columns of the packed tokens,
            first.
        counts: ``[4]`` int32. **Changed** to the number of rows, their tokens, the rows whose first token is masked
            though others are not, and their tokens again.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: shapes, dtypes or devices do not match, a tensor that is written is not contiguous or shares memory
            with another one; on the CPU also a batch larger than the buffers.
        BackendUnavailableError: `backend` cannot run here.

    >>> import torch
    >>> import earlyexit_kernels as ee
    >>> ids, mask = torch.tensor([[7, 8, 9], [4, 0, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    >>> ints = lambda *shape: torch.zeros(shape, dtype=torch.int32)
    >>> found, row_ids, offsets, counts = ints(2, 2), ints(2), ints(3), ints(4)
    >>> tokens, unused = torch.zeros(4, 6, dtype=torch.int64), torch.zeros_like(ids)
    >>> ee.ops.pack_tokens(
    ...     batch=torch.tensor([2, 3, 1, 0, 0], dtype=torch.int32), ids=ids, mask=mask, positions=unused, types=unused,
    ...     found=found, row_ids=row_ids, offsets=offsets, tokens=tokens, counts=counts,
    ... )
    >>> tokens[0, :4].tolist(), offsets.tolist(), counts.tolist()
    ([7, 8, 9, 4], [0, 3, 4], [2, 4, 0, 4])
    """
    op = "pack_tokens"
    inputs = _checked(
        op,
        {"batch": batch, "ids": ids, "mask": mask, "positions": positions, "types": types},
        {"found": found, "row_ids": row_ids, "offsets": offsets, "tokens": tokens, "counts": counts},
    )
    bare_op(op, backend, ids.device.type)(*inputs, found, row_ids, offsets, tokens, counts)


@not_traced
def _checked(op: str, read: dict[str, Tensor], written: dict[str, Tensor]) -> list[Tensor]:
    ids = read["ids"]
    check_tensor(op, "ids", ids, (None, None), INT64)
    (rows, width), device = ids.shape, ids.device
    check_tensor(op, "batch", read["batch"], (5,), INT32, device=device)
    for name in ("mask", "positions", "types"):
        check_tensor(op, name, read[name], (rows, width), INT64, device=device)
    for name, shape, dtypes in (
        ("found", (2, rows), INT32),
        ("row_ids", (rows,), INT32),
        ("offsets", (rows + 1,), INT32),
        ("tokens", (4, None), INT64),
        ("counts", (4,), INT32),
    ):
        check_tensor(op, name, written[name], shape, dtypes, written=True, device=device)
    if (capacity := written["tokens"].shape[1]) < rows * width:
        raise ValueError(f"{op}: expected tokens [4, T] with T >= {rows * width}, got T {capacity}")
    if device.type == "cpu":
        n, s = read["batch"][:2].tolist()
        if not (0 <= n <= rows and 0 <= s <= width):
            raise ValueError(f"{op}: expected a batch of at most {rows} rows of {width} tokens, got {n} of {s}")
    contiguous = {name: tensor.contiguous() for name, tensor in read.items()}
    check_apart(op, written, contiguous)
    return list(contiguous.values())
