"""Attention within each row, over packed tokens whose rows only the device knows."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from earlyexit_kernels.backends import TRITON_INTERPRETED, jit, resolve, tl
from earlyexit_kernels.ops.checks import FLOATS, check_apart, check_present, check_tensor, check_whole
from earlyexit_kernels.ops.schema import PYTHON_BACK_ENDS, ROWS_ATTENTION, define

#: Bytes of an element -> queries of a program, keys that it looks at together, its warps, and the stages of its loop:
#: the same for every longest row. Unmeasured. More float32 than this doesn't fit into registers.
BLOCKS = {2: (64, 64, 4, 2), 4: (32, 32, 8, 2)}


@jit
def rows_attention_kernel(
    qkv,  # [T, 3 H]
    offsets,  # [R + 1] int32
    row_ids,  # [R] int32
    out,  # [T, H]
    H: tl.constexpr,
    D: tl.constexpr,  # H / heads
    SCALE: tl.constexpr,  # of the logits, to base 2
    LIMIT: tl.constexpr,  # longest row in the interpreter, which needs a constant bound; else 0
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program for each row, head and block of queries; it walks the row's keys from the first one."""
    row = tl.program_id(0)
    top = tl.program_id(2) * BLOCK_M
    first = tl.load(offsets + row)
    length = tl.where(tl.load(row_ids + row) < 0, 0, tl.load(offsets + row + 1) - first)
    if top < length:
        token = (first - tl.load(offsets)).to(tl.int64)
        m = top + tl.arange(0, BLOCK_M)
        n = tl.arange(0, BLOCK_N)
        d = tl.arange(0, BLOCK_D)
        queries = (m[:, None] < length) & (d[None, :] < D)
        stride = 3 * H
        column = tl.program_id(1) * D
        from_q = qkv + token * stride + column
        from_k = from_q + H + n[None, :] * stride + d[:, None]
        from_v = from_q + 2 * H + n[:, None] * stride + d[None, :]
        q = tl.load(from_q + m[:, None] * stride + d[None, :], mask=queries, other=0.0)
        largest = tl.full((BLOCK_M,), -float("inf"), dtype=tl.float32)
        total = tl.zeros((BLOCK_M,), dtype=tl.float32)
        sums = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
        for start in range(0, LIMIT if LIMIT > 0 else length, BLOCK_N):
            keys = n < length - start
            k = tl.load(from_k + start * stride, mask=keys[None, :] & (d[:, None] < D), other=0.0)
            z = tl.dot(q, k, input_precision="ieee") * SCALE
            z = tl.where(keys[None, :], z, -float("inf"))
            larger = tl.maximum(largest, tl.max(z, 1))
            p = tl.exp2(z - larger[:, None])
            shrunk = tl.exp2(largest - larger)
            total = total * shrunk + tl.sum(p, 1)
            v = tl.load(from_v + start * stride, mask=keys[:, None] & (d[None, :] < D), other=0.0)
            sums = tl.dot(p.to(v.dtype), v, sums * shrunk[:, None], input_precision="ieee")
            largest = larger
        y = (sums / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + (token + m[:, None]) * H + column + d[None, :], y, mask=queries)


def rows_attention_triton(qkv: Tensor, offsets: Tensor, row_ids: Tensor, heads: int, longest: int, out: Tensor) -> None:
    """Launch `rows_attention_kernel`."""
    rows, width = row_ids.numel(), out.shape[1]
    size = width // heads
    block_m, block_n, warps, stages = BLOCKS[out.dtype.itemsize]
    grid = (rows, heads, -(-longest // block_m))
    if rows and longest and out.numel():
        rows_attention_kernel[grid](
            qkv,
            offsets,
            row_ids,
            out,
            H=width,
            D=size,
            SCALE=math.log2(math.e) / math.sqrt(size),
            LIMIT=longest if TRITON_INTERPRETED else 0,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_D=max(16, 1 << (size - 1).bit_length()),
            num_warps=warps,
            num_stages=stages,
            enable_fp_fusion=False,
        )


@torch.no_grad()
def rows_attention_torch(qkv: Tensor, offsets: Tensor, row_ids: Tensor, heads: int, longest: int, out: Tensor) -> None:
    """`rows_attention` in torch, row by row, the reference of the other back-end."""
    start, *ends = offsets.tolist()
    token = 0
    for row_id, end in zip(row_ids.tolist(), ends, strict=True):
        part = slice(token, token := end - start)
        if row_id >= 0:
            q, k, v = qkv[part].float().view(part.stop - part.start, 3, heads, -1).permute(1, 2, 0, 3)
            y = F.scaled_dot_product_attention(q, k, v)
            out[part] = y.transpose(0, 1).flatten(1).to(out.dtype)


_ROWS_ATTENTION = define(
    "rows_attention",
    ROWS_ATTENTION,
    implementations={"torch": rows_attention_torch, "triton": rows_attention_triton},
    back_ends=PYTHON_BACK_ENDS,
)


def rows_attention(
    qkv: Tensor, offsets: Tensor, row_ids: Tensor, heads: int, longest: int, out: Tensor, *, backend: str = "auto"
) -> None:
    """Write ``softmax(q k^T / sqrt(D)) v`` within each row present; D is H / heads.

    Args:
        qkv: ``[T, 3 H]``, query, key and value of each token, those of row i from ``offsets[i] - offsets[0]`` on.
            float32, float16 or bfloat16.
        offsets: ``[R + 1]`` int32.
        row_ids: ``[R]`` int32, -1 where a row has left or there is none. On CUDA they and the offsets are trusted,
            since looking would cost a synchronisation.
        heads: divides H.
        longest: tokens of the longest row there can be; a longer one isn't finished.
        out: ``[T, H]``, dtype of `qkv`, apart from it in memory. **Changed** for the tokens of the rows present.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Raises:
        ValueError: shapes, dtypes or devices don't fit.
        BackendUnavailableError: `backend` can't run here.

    Logits and softmax are float32, without TF32; in triton probabilities are rounded to the dtype of `qkv` before they
    meet the values. A token's keys come in one order, in blocks of one size counted from its row's first token, so its
    bits depend on nothing but the row. Nothing of another row is read.
    """
    op = "rows_attention"
    check_tensor(op, "out", out, (None, None), FLOATS, written=True)
    (capacity, width), device = out.shape, out.device
    check_tensor(op, "qkv", qkv, (capacity, 3 * width), (out.dtype,), device=device)
    check_whole(op, heads=heads, longest=longest)
    check_present(op, offsets, row_ids, capacity=capacity, device=device)
    if heads < 1 or width % heads:
        raise ValueError(f"{op}: expected heads to divide {width}, the width of out, got {heads}")
    if device.type == "cpu" and row_ids.numel():
        _check_longest(offsets.diff()[row_ids >= 0], longest)
    qkv, offsets, row_ids = qkv.contiguous(), offsets.contiguous(), row_ids.contiguous()
    check_apart(op, {"out": out}, {"qkv": qkv, "offsets": offsets, "row_ids": row_ids})
    _ROWS_ATTENTION[resolve(backend, device.type, PYTHON_BACK_ENDS)](qkv, offsets, row_ids, heads, longest, out)


def _check_longest(lengths: Tensor, longest: int) -> None:
    if lengths.numel() and int(lengths.max()) > longest:
        raise ValueError(
            f"rows_attention: expected rows of at most {longest} tokens, got one of {int(lengths.max())}; "
            "pass the longest there can be"
        )
