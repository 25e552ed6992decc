"""Attention within each row of packed tokens whose number only the device knows."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from earlyexit_kernels.backends import jit, tl
from earlyexit_kernels.ops.checks import (
    FLOATS,
    INT64,
    check_apart,
    check_longest,
    check_present,
    check_starts,
    check_tensor,
    check_whole,
    not_traced,
)
from earlyexit_kernels.ops.schema import ROWS_ATTENTION, bare_op, define
from earlyexit_kernels.ops.tiles import looping_programs

#: Bytes per element -> queries of a program at a time, keys per step, warps, and pipeline stages; the same for every
#: maximum length. Unmeasured. Larger float32 blocks do not fit into registers.
BLOCKS = {2: (64, 64, 4, 2), 4: (32, 32, 8, 2)}
#: The same with a window for heads of more than `WIDE` numbers, which leave too few registers for the columns.
WIDE, WIDE_WINDOW_BLOCKS = 64, {2: (64, 64, 8, 2), 4: (32, 32, 8, 3)}
#: A window of all columns, whose sum with a column is an int32.
WIDEST_WINDOW = 1 << 30
#: Programs per multiprocessor, of which 2, 3 or 4 run at a time, depending on the GPU and the window. Unmeasured.
RESIDENT = 12


@jit
def rows_attention_kernel(
    qkv,  # [T, 3 H]
    offsets,  # [R + 1] int32
    row_ids,  # [R] int32
    out,  # [T, H]
    columns,  # [P] int64; read with a window
    starts,  # [N] int32; read with a window
    rows,  # R
    longest,  # tokens of a row
    H: tl.constexpr,
    D: tl.constexpr,  # H / heads
    SCALE: tl.constexpr,  # of the logits, to base 2
    WINDOW: tl.constexpr,  # 0 for none
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Persistent programs, which loop over blocks of queries, rows and heads, in these over the keys from the first on.

    With a window, blocks of keys that are out of reach by their places are left out; columns are at least as far apart.
    The first blocks of all rows come first, so that the programs share them evenly.
    """
    heads: tl.constexpr = H // D
    items = tl.cdiv(longest, BLOCK_M) * rows * heads
    for number in tl.range(tl.program_id(0), items, tl.num_programs(0), disable_licm=True):
        top = number // (rows * heads) * BLOCK_M
        row = number % (rows * heads) // heads
        first = tl.load(offsets + row)
        length = tl.where(tl.load(row_ids + row) < 0, 0, tl.load(offsets + row + 1) - first)
        if top < length:
            token = (first - tl.load(offsets)).to(tl.int64)
            m = top + tl.arange(0, BLOCK_M)
            n = tl.arange(0, BLOCK_N)
            d = tl.arange(0, BLOCK_D)
            queries = (m[:, None] < length) & (d[None, :] < D)
            stride = 3 * H
            column = number % heads * D
            from_q = qkv + (token * stride + column)
            q = tl.load(from_q + (m[:, None] * stride + d[None, :]), mask=queries, other=0.0)
            largest = tl.full((BLOCK_M,), -float("inf"), dtype=tl.float32)
            total = tl.zeros((BLOCK_M,), dtype=tl.float32)
            sums = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
            begin = 0
            end = length
            if WINDOW > 0:
                begin = tl.maximum(top - (WINDOW - 1), 0) // BLOCK_N * BLOCK_N
                end = tl.minimum(length, top + BLOCK_M + WINDOW - 1)
                own = columns + tl.load(starts + tl.load(row_ids + row)).to(tl.int64)
                at = tl.load(own + m, mask=m < length, other=0).to(tl.int32)
            for start in tl.range(begin, end, BLOCK_N):
                keys = n < length - start
                from_k = from_q + start * stride + H
                k = tl.load(
                    from_k + (n[None, :] * stride + d[:, None]), mask=keys[None, :] & (d[:, None] < D), other=0.0
                )
                z = tl.dot(q, k, input_precision="ieee") * SCALE
                seen = keys[None, :]
                if WINDOW > 0:
                    of_key = tl.load(own + start + n, mask=keys, other=0).to(tl.int32)[None, :]
                    seen = seen & (of_key < at[:, None] + WINDOW) & (of_key > at[:, None] - WINDOW)
                z = tl.where(seen, z, -float("inf"))
                larger = tl.maximum(largest, tl.max(z, 1))
                base = larger
                if WINDOW > 0:
                    # a query without a key so far: all terms are exp2(-inf)
                    base = tl.where(larger == -float("inf"), 0.0, larger)
                p = tl.exp2(z - base[:, None])
                shrunk = tl.exp2(largest - base)
                total = total * shrunk + tl.sum(p, 1)
                from_v = from_q + start * stride + 2 * H
                v = tl.load(
                    from_v + (n[:, None] * stride + d[None, :]), mask=keys[:, None] & (d[None, :] < D), other=0.0
                )
                sums = tl.dot(p.to(v.dtype), v, sums * shrunk[:, None], input_precision="ieee")
                largest = larger
            y = (sums / total[:, None]).to(out.dtype.element_ty)
            tl.store(out + (token * H + column) + (m[:, None] * H + d[None, :]), y, mask=queries)


def rows_attention_triton(
    qkv: Tensor,
    offsets: Tensor,
    row_ids: Tensor,
    heads: int,
    longest: int,
    out: Tensor,
    window: int | None = None,
    columns: Tensor | None = None,
    starts: Tensor | None = None,
) -> None:
    """Launch `rows_attention_kernel`."""
    rows, width = row_ids.numel(), out.shape[1]
    size = width // heads
    blocks = BLOCKS if window is None or size <= WIDE else WIDE_WINDOW_BLOCKS
    block_m, block_n, warps, stages = blocks[out.dtype.itemsize]
    programs = looping_programs(-(-longest // block_m) * rows * heads, RESIDENT, out.device)
    if programs and out.numel():
        rows_attention_kernel[(programs,)](
            qkv,
            offsets,
            row_ids,
            out,
            offsets if columns is None else columns,
            offsets if starts is None else starts,
            rows,
            longest,
            H=width,
            D=size,
            SCALE=math.log2(math.e) / math.sqrt(size),
            WINDOW=min(window or 0, WIDEST_WINDOW),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_D=max(16, 1 << (size - 1).bit_length()),
            num_warps=warps,
            num_stages=stages,
            enable_fp_fusion=False,
        )


@torch.no_grad()
def rows_attention_torch(
    qkv: Tensor,
    offsets: Tensor,
    row_ids: Tensor,
    heads: int,
    longest: int,
    out: Tensor,
    window: int | None = None,
    columns: Tensor | None = None,
    starts: Tensor | None = None,
) -> None:
    """`rows_attention` in torch, row by row, the reference of the Triton back-end."""
    start, *ends = offsets.tolist()
    token = 0
    for row_id, end in zip(row_ids.tolist(), ends, strict=True):
        part = slice(token, token := end - start)
        if row_id >= 0:
            near = None
            if window is not None and columns is not None and starts is not None:
                own = columns[int(starts[row_id]) :][: part.stop - part.start]
                near = (own[:, None] - own).abs() < window
            q, k, v = qkv[part].float().view(part.stop - part.start, 3, heads, -1).permute(1, 2, 0, 3)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=near)
            out[part] = y.transpose(0, 1).flatten(1).to(out.dtype)


define(
    "rows_attention",
    ROWS_ATTENTION,
    implementations={"torch": rows_attention_torch, "triton": rows_attention_triton},
)


def rows_attention(
    qkv: Tensor,
    offsets: Tensor,
    row_ids: Tensor,
    heads: int,
    longest: int,
    out: Tensor,
    *,
    window: int | None = None,
    columns: Tensor | None = None,
    starts: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Write ``softmax(q k^T / sqrt(D)) v`` within each present row, with D = H / heads.

    Logits and softmax are float32, without TF32; Triton rounds the probabilities to the dtype of `qkv` before they are
    multiplied by the values. Keys are summed in blocks of one size from the first token of the row on, so that the
    result does not depend on other rows, bit for bit.

    Args:
        qkv: ``[T, 3 H]``, query, key and value of each token; row i starts at ``offsets[i] - offsets[0]``. float32,
            float16 or bfloat16.
        offsets: ``[R + 1]`` int32, non-decreasing.
        row_ids: ``[R]`` int32, -1 for a row that has left or does not exist. On CUDA the values of ids, offsets,
            columns and starts are not checked, since that would synchronise.
        heads: number of heads, a divisor of H.
        longest: maximum number of tokens of a row; longer rows are computed in part.
        out: ``[T, H]``, dtype of `qkv`, not overlapping it. **Changed** for the tokens of the present rows.
        window: a token attends to those fewer than this many columns away; None: to all of its row.
        columns: with a window, ``[P]`` int64, the column of each token in its padded row, ascending within a row, in
            the order before any row has moved.
        starts: with a window, ``[N]`` int32, by row id: the row's first token in `columns`.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Raises:
        TypeError: an argument is not a tensor, or not a whole number where one is required.
        ValueError: shapes, dtypes or devices do not match, `out` overlaps another tensor, `heads` does not divide H, a
            window below 1, or `columns` or `starts` without a window; on the CPU also a row longer than `longest`, or
            with fewer columns than tokens.
        BackendUnavailableError: `backend` cannot run here.

    >>> import torch
    >>> import earlyexit_kernels as ee
    >>> qkv = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 3.0], [0.0, 0.0, 5.0]])
    >>> offsets, row_ids = torch.tensor([0, 2, 3], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    >>> out = torch.zeros(3, 1)
    >>> ee.ops.rows_attention(qkv, offsets, row_ids, heads=1, longest=2, out=out)
    >>> out[:, 0].tolist()
    [2.0, 2.0, 5.0]
    """
    op = "rows_attention"
    read = _checked(op, qkv, offsets, row_ids, heads, longest, out, window, columns, starts)
    qkv, offsets, row_ids, columns, starts = read
    bare_op(op, backend, out.device)(qkv, offsets, row_ids, heads, longest, out, window, columns, starts)


@not_traced
def _checked(
    op: str,
    qkv: Tensor,
    offsets: Tensor,
    row_ids: Tensor,
    heads: int,
    longest: int,
    out: Tensor,
    window: int | None,
    columns: Any,
    starts: Any,
) -> tuple[Any, ...]:
    check_tensor(op, "out", out, (None, None), FLOATS, written=True)
    (capacity, width), device = out.shape, out.device
    check_tensor(op, "qkv", qkv, (capacity, 3 * width), (out.dtype,), device=device)
    check_whole(op, heads=heads, longest=longest)
    check_present(op, offsets, row_ids, capacity=capacity, device=device)
    if heads < 1 or width % heads:
        raise ValueError(f"{op}: expected heads to divide {width}, the width of out, got {heads}")
    if device.type == "cpu" and row_ids.numel():
        check_longest(op, offsets.diff()[row_ids >= 0], longest)
    read = {"qkv": qkv.contiguous(), "offsets": offsets.contiguous(), "row_ids": row_ids.contiguous()}
    if window is not None:
        check_whole(op, window=window)
        if window < 1:
            raise ValueError(f"{op}: expected window to be at least 1 column, got {window}")
        check_tensor(op, "columns", columns, (None,), INT64, device=device)
        check_starts(op, starts, offsets, row_ids, longest=longest, tokens=len(columns))
        columns, starts = columns.contiguous(), starts.contiguous()
    elif columns is not None or starts is not None:
        raise ValueError(f"{op}: expected columns and starts only with a window, got window None")
    read = {"qkv": qkv.contiguous(), "offsets": offsets.contiguous(), "row_ids": row_ids.contiguous()}
    check_apart(op, {"out": out}, {**read, "columns": columns, "starts": starts})
    return *read.values(), columns, starts
