"""Packing of the tokens of a batch on the device, without synchronisation, and the counts and state before layer 1.

    ids [R, S] -> ids [T] of the kept tokens, their positions, types and columns, offsets [R + 1] and row ids [R]

A row without any token keeps its first one, as in `packing.pack`. The buffer beyond the kept tokens is not written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from earlyexit_kernels.backends import jit, tl
from earlyexit_kernels.ops.checks import FLOAT32, INT32, INT64, check_apart, check_tensor, not_traced
from earlyexit_kernels.ops.schema import PACK_TOKENS, bare_op, define

#: Maximum number of columns per step of a program.
MAX_COLUMNS = 1024
#: Maximum number of tokens that each program counts itself, which saves a launch. Unmeasured.
COUNTED_TOKENS = 4096


@jit
def kept_tokens(batch, mask, c, row, width):
    """Return which columns of a row, or of rows, are kept, as 0 and 1."""
    inside = c < tl.where(row < tl.load(batch), tl.load(batch + 1), 0)
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
    found,  # [2, R] int32, as count_tokens_kernel leaves it, or written with COUNTS_ALL
    row_ids,  # [R] int32
    offsets,  # [R + 1] int32
    tokens,  # [4, T] int64: ids, positions, types, columns
    counts,  # [M] int32
    first_state,  # [K] float32
    state,  # [K, R] float32
    rows,  # R
    width,  # S
    capacity,  # T
    COUNTS_ALL: tl.constexpr,
    CELLS: tl.constexpr,
    STATES: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CELLS: tl.constexpr,
    BLOCK_STATES: tl.constexpr,
):
    """One program per row, which sums the lengths of the rows before it."""
    row = tl.program_id(0)
    real = tl.load(batch)
    end = tl.where(row < real, tl.load(batch + 1), 0)
    has_positions = tl.load(batch + 3)
    has_types = tl.load(batch + 4)
    i = tl.arange(0, BLOCK)
    j = tl.arange(0, BLOCK_ROWS)
    if COUNTS_ALL:
        every = kept_tokens(batch, mask, i[None, :], j[:, None], width)
        total = tl.sum(every, 1)
        first = tl.sum(tl.where(i[None, :] == 0, every, 0), 1)
        tl.store(found + j, total, mask=j == row)
        tl.store(found + rows + j, first, mask=j == row)
    else:
        total = tl.load(found + j, mask=j < real, other=0)
        first = tl.load(found + rows + j, mask=j < real, other=0)
    length = tl.where(j < real, tl.maximum(total, 1), 0)
    own = tl.sum(tl.where(j == row, total, 0), 0)
    place = tl.sum(tl.where(j < row, length, 0), 0)
    tl.store(row_ids + row, tl.where(row < real, row, -1))
    tl.store(offsets + row + 1, place + tl.where(row < real, tl.maximum(own, 1), 0))
    if STATES:
        k = tl.arange(0, BLOCK_STATES)
        before = tl.load(first_state + k, mask=k < STATES, other=0.0)
        tl.store(state + k * rows + row, before, mask=k < STATES)
    if row == 0:
        tl.store(offsets, 0)
        kept_in_all = tl.sum(length, 0)
        masked_first = tl.sum(((first == 0) & (total > 0)).to(tl.int32), 0)
        cell = tl.arange(0, BLOCK_CELLS)
        count = tl.where((cell == 1) | (cell == 3), kept_in_all, tl.where(cell == 2, masked_first, 0))
        tl.store(counts + cell, tl.where(cell == 0, real, count), mask=cell < CELLS)
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
    first_state: Tensor,
    state: Tensor,
) -> None:
    """Launch `pack_tokens_kernel`, for many tokens after `count_tokens_kernel`."""
    rows, width = ids.shape
    block, block_rows, cells, states = min(MAX_COLUMNS, _block(width)), _block(rows), counts.numel(), state.shape[0]
    counts_all = width <= block and block * block_rows <= COUNTED_TOKENS
    if not counts_all:
        warps = max(1, min(4, block // 128))
        count_tokens_kernel[(rows,)](batch, mask, found, rows, width, BLOCK=block, num_warps=warps)
    pack_tokens_kernel[(rows,)](
        batch, ids, mask, positions, types, found, row_ids, offsets, tokens, counts, first_state, state, rows, width,
        tokens.shape[1], COUNTS_ALL=counts_all, CELLS=cells, STATES=states, BLOCK=block, BLOCK_ROWS=block_rows,
        BLOCK_CELLS=_block(cells), BLOCK_STATES=_block(max(1, states)), num_warps=4,
    )  # fmt: skip


def _block(size: int) -> int:
    """Return the smallest power of two that is not below a size."""
    return 1 << (size - 1).bit_length()


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
    first_state: Tensor,
    state: Tensor,
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
    counts.zero_()
    counts[:4] = torch.stack((batch[0], kept, ((found[0, :n] > 0) & (found[1, :n] == 0)).sum(), kept))
    state.copy_(first_state[:, None].expand_as(state))


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
    first_state: Tensor,
    state: Tensor,
    backend: str = "auto",
) -> None:
    """Pack the tokens of a batch into buffers of fixed size, without synchronisation on CUDA.

    What the exits write at every layer is reset by the same launch.

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
        counts: ``[M]`` int32, M at least 4. **Changed** to the number of rows, their tokens, the rows whose first token
            is masked though others are not, their tokens again, and zeros.
        first_state: ``[K]`` float32, the state of a criterion before layer 1.
        state: ``[K, R]`` float32. **Changed** to `first_state` for each row.
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
    >>> state = torch.zeros(1, 2)
    >>> tokens, unused = torch.zeros(4, 6, dtype=torch.int64), torch.zeros_like(ids)
    >>> ee.ops.pack_tokens(
    ...     batch=torch.tensor([2, 3, 1, 0, 0], dtype=torch.int32), ids=ids, mask=mask, positions=unused, types=unused,
    ...     found=found, row_ids=row_ids, offsets=offsets, tokens=tokens, counts=counts,
    ...     first_state=torch.tensor([0.5]), state=state,
    ... )
    >>> tokens[0, :4].tolist(), offsets.tolist(), counts.tolist(), state.tolist()
    ([7, 8, 9, 4], [0, 3, 4], [2, 4, 0, 4], [[0.5, 0.5]])
    """
    op = "pack_tokens"
    *inputs, first_state = _checked(
        op,
        {"batch": batch, "ids": ids, "mask": mask, "positions": positions, "types": types, "first_state": first_state},
        {"found": found, "row_ids": row_ids, "offsets": offsets, "tokens": tokens, "counts": counts, "state": state},
    )
    written = found, row_ids, offsets, tokens, counts
    bare_op(op, backend, ids.device)(*inputs, *written, first_state, state)


@not_traced
def _checked(op: str, read: dict[str, Tensor], written: dict[str, Tensor]) -> list[Tensor]:
    ids = read["ids"]
    check_tensor(op, "ids", ids, (None, None), INT64)
    (rows, width), device = ids.shape, ids.device
    check_tensor(op, "batch", read["batch"], (5,), INT32, device=device)
    for name in ("mask", "positions", "types"):
        check_tensor(op, name, read[name], (rows, width), INT64, device=device)
    check_tensor(op, "first_state", read["first_state"], (None,), FLOAT32, device=device)
    for name, shape, dtypes in (
        ("found", (2, rows), INT32),
        ("row_ids", (rows,), INT32),
        ("offsets", (rows + 1,), INT32),
        ("tokens", (4, None), INT64),
        ("counts", (None,), INT32),
        ("state", (read["first_state"].shape[0], rows), FLOAT32),
    ):
        check_tensor(op, name, written[name], shape, dtypes, written=True, device=device)
    if (capacity := written["tokens"].shape[1]) < rows * width:
        raise ValueError(f"{op}: expected tokens [4, T] with T >= {rows * width}, got T {capacity}")
    if (cells := written["counts"].shape[0]) < 4:
        raise ValueError(f"{op}: expected counts [M] with M >= 4, got M {cells}")
    if device.type == "cpu":
        n, s = read["batch"][:2].tolist()
        if not (0 <= n <= rows and 0 <= s <= width):
            raise ValueError(f"{op}: expected a batch of at most {rows} rows of {width} tokens, got {n} of {s}")
    contiguous = {name: tensor.contiguous() for name, tensor in read.items()}
    check_apart(op, written, contiguous)
    return list(contiguous.values())
