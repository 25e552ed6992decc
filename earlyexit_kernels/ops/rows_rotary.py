"""Rotary positions of the query and key of packed tokens whose number only the device knows."""

from __future__ import annotations

import torch
from torch import Tensor

from earlyexit_kernels.backends import jit, tl
from earlyexit_kernels.ops.checks import (
    FLOATS,
    check_apart,
    check_present,
    check_starts,
    check_tensor,
    check_whole,
    not_traced,
)
from earlyexit_kernels.ops.schema import ROWS_ROTARY, bare_op, define
from earlyexit_kernels.ops.tiles import looping_programs

#: Tokens of a program at a time, each of one head, its warps, and programs per multiprocessor. Unmeasured.
BLOCK_TOKENS, WARPS, RESIDENT = 32, 4, 10


@jit
def rows_rotary_kernel(
    qkv,  # [T, 3 H]
    cos,  # [P, D]
    sin,  # [P, D]
    starts,  # [N] int32
    offsets,  # [R + 1] int32
    row_ids,  # [R] int32
    rows,  # R
    longest,  # tokens of a row
    H: tl.constexpr,
    D: tl.constexpr,  # H / heads
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Persistent programs, which loop over blocks of tokens, rows, and heads of query or key."""
    start = tl.load(offsets)
    heads: tl.constexpr = 2 * (H // D)
    half: tl.constexpr = D // 2
    d = tl.arange(0, BLOCK_D)
    items = tl.cdiv(longest, BLOCK_M) * rows * heads
    for number in tl.range(tl.program_id(0), items, tl.num_programs(0), disable_licm=True):
        top = number // (rows * heads) * BLOCK_M
        row = number % (rows * heads) // heads
        first = tl.load(offsets + row)
        row_id = tl.load(row_ids + row)
        length = tl.where(row_id < 0, 0, tl.load(offsets + row + 1) - first)
        if top < length:
            place = top + tl.arange(0, BLOCK_M)
            inside = (place[:, None] < length) & (d[None, :] < half)
            token = (first - start + place).to(tl.int64)
            angle = (tl.load(starts + row_id) + place).to(tl.int64)
            at = qkv + token[:, None] * (3 * H) + number % heads * D + d[None, :]
            by = angle[:, None] * D + d[None, :]
            x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            y = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
            turned_x = x * tl.load(cos + by, mask=inside, other=0.0).to(tl.float32)
            turned_x -= y * tl.load(sin + by, mask=inside, other=0.0).to(tl.float32)
            turned_y = y * tl.load(cos + by + half, mask=inside, other=0.0).to(tl.float32)
            turned_y += x * tl.load(sin + by + half, mask=inside, other=0.0).to(tl.float32)
            tl.store(at, turned_x.to(qkv.dtype.element_ty), mask=inside)
            tl.store(at + half, turned_y.to(qkv.dtype.element_ty), mask=inside)


def rows_rotary_triton(
    qkv: Tensor, cos: Tensor, sin: Tensor, starts: Tensor, offsets: Tensor, row_ids: Tensor, heads: int, longest: int
) -> None:
    """Launch `rows_rotary_kernel`."""
    rows, width = row_ids.numel(), qkv.shape[1] // 3
    size = width // heads
    programs = looping_programs(-(-longest // BLOCK_TOKENS) * rows * 2 * heads, RESIDENT, qkv.device)
    if programs and qkv.numel():
        rows_rotary_kernel[(programs,)](
            qkv,
            cos,
            sin,
            starts,
            offsets,
            row_ids,
            rows,
            longest,
            H=width,
            D=size,
            BLOCK_M=BLOCK_TOKENS,
            BLOCK_D=1 << (size // 2 - 1).bit_length(),
            num_warps=WARPS,
            enable_fp_fusion=False,
        )


@torch.no_grad()
def rows_rotary_torch(
    qkv: Tensor, cos: Tensor, sin: Tensor, starts: Tensor, offsets: Tensor, row_ids: Tensor, heads: int, longest: int
) -> None:
    """`rows_rotary` in torch, row by row, the reference of the Triton back-end."""
    start, *ends = offsets.tolist()
    token = 0
    for row_id, end in zip(row_ids.tolist(), ends, strict=True):
        part = slice(token, token := end - start)
        if row_id >= 0:
            first, length = int(starts[row_id]), part.stop - part.start
            c, s = (x[first : first + length, None].float() for x in (cos, sin))
            own = qkv[part].view(length, 3, heads, -1)[:, :2]
            low, high = own.float().chunk(2, dim=-1)
            own.copy_(own.float() * c[:, None] + torch.cat((-high, low), dim=-1) * s[:, None])


define("rows_rotary", ROWS_ROTARY, implementations={"torch": rows_rotary_torch, "triton": rows_rotary_triton})


def rows_rotary(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    starts: Tensor,
    offsets: Tensor,
    row_ids: Tensor,
    heads: int,
    longest: int,
    *,
    backend: str = "auto",
) -> None:
    """Rotate query and key of the present rows by the angles of their tokens, in place.

    With halves ``(x, y)`` of a head, the result is ``x cos - y sin`` and ``y cos + x sin``, in float32, as in
    transformers' `apply_rotary_pos_emb`.

    Args:
        qkv: ``[T, 3 H]``, query, key and value of each token; row i starts at ``offsets[i] - offsets[0]``. float32,
            float16 or bfloat16. **Changed** for the tokens of the present rows.
        cos, sin: ``[P, D]``, dtype of `qkv`, with D = H / heads, of tokens in the order before any row has moved.
        starts: ``[N]`` int32, by row id: which line of `cos` and `sin` is that of the row's first token.
        offsets: ``[R + 1]`` int32, non-decreasing.
        row_ids: ``[R]`` int32 below N, -1 for a row that has left or does not exist. On CUDA the values of ids, starts
            and offsets are not checked, since that would synchronise.
        heads: number of heads, a divisor of H; D is even.
        longest: maximum number of tokens of a row; longer rows are rotated in part.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Raises:
        TypeError: an argument is not a tensor, or not a whole number where one is required.
        ValueError: shapes, dtypes or devices do not match, `qkv` overlaps another tensor, or `heads` does not divide H
            into even parts; on the CPU also a row longer than `longest`, or with fewer angles than tokens.
        BackendUnavailableError: `backend` cannot run here.

    >>> import torch
    >>> import earlyexit_kernels as ee
    >>> qkv = torch.tensor([[1.0, 0.0, 0.0, 2.0, 5.0, 6.0], [1.0, 0.0, 0.0, 2.0, 5.0, 6.0]])
    >>> cos, sin = torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    >>> ints = lambda *values: torch.tensor(values, dtype=torch.int32)
    >>> ee.ops.rows_rotary(qkv, cos, sin, ints(0), ints(0, 2), ints(0), heads=1, longest=2)
    >>> qkv.tolist()
    [[1.0, 0.0, 0.0, 2.0, 5.0, 6.0], [0.0, 1.0, -2.0, 0.0, 5.0, 6.0]]
    """
    op = "rows_rotary"
    read = _checked(op, qkv, cos, sin, starts, offsets, row_ids, heads, longest)
    bare_op(op, backend, qkv.device)(qkv, *read, heads, longest)


@not_traced
def _checked(
    op: str,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    starts: Tensor,
    offsets: Tensor,
    row_ids: Tensor,
    heads: int,
    longest: int,
) -> tuple[Tensor, ...]:
    check_tensor(op, "qkv", qkv, (None, None), FLOATS, written=True)
    (capacity, columns), device = qkv.shape, qkv.device
    check_whole(op, heads=heads, longest=longest)
    if heads < 1 or columns % (6 * heads):
        raise ValueError(
            f"{op}: expected heads to divide a third of {columns}, the width of qkv, into even parts, got {heads}"
        )
    check_tensor(op, "cos", cos, (None, columns // (3 * heads)), (qkv.dtype,), device=device)
    check_tensor(op, "sin", sin, tuple(cos.shape), (qkv.dtype,), device=device)
    check_present(op, offsets, row_ids, capacity=capacity, device=device)
    check_starts(op, starts, offsets, row_ids, longest=longest, tokens=cos.shape[0])
    cos, sin, starts, offsets, row_ids = (x.contiguous() for x in (cos, sin, starts, offsets, row_ids))
    read = {"cos": cos, "sin": sin, "starts": starts, "offsets": offsets, "row_ids": row_ids}
    check_apart(op, {"qkv": qkv}, read)
    return tuple(read.values())
