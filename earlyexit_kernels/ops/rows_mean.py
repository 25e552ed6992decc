"""Mean of the tokens of each present row, whose number only the device knows."""

from __future__ import annotations

import torch
from torch import Tensor

from earlyexit_kernels.backends import jit, tl
from earlyexit_kernels.ops.checks import (
    FLOATS,
    check_apart,
    check_no_empty_row,
    check_present,
    check_tensor,
    not_traced,
)
from earlyexit_kernels.ops.schema import ROWS_MEAN, bare_op, define

#: Tokens per step and columns per program, the same for every length, so that all add in the same order. Unmeasured.
BLOCK_TOKENS, BLOCK_COLUMNS = 32, 64


@jit
def rows_mean_kernel(
    hidden,  # [2 T, H]
    offsets,  # [R + 1] int32
    row_ids,  # [R] int32
    out,  # [R, H]
    H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One program per row and block of columns."""
    row = tl.program_id(0)
    first = tl.load(offsets + row)
    length = tl.where(tl.load(row_ids + row) < 0, 0, tl.load(offsets + row + 1) - first)
    if length > 0:
        m = tl.arange(0, BLOCK_M)
        h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        at = hidden + (first + m).to(tl.int64)[:, None] * H + h[None, :]
        sums = tl.zeros((BLOCK_M, BLOCK_H), dtype=tl.float32)
        for start in tl.range(0, length, BLOCK_M):
            inside = (m[:, None] < length - start) & (h[None, :] < H)
            sums += tl.load(at + start * H, mask=inside, other=0.0).to(tl.float32)
        y = tl.sum(sums, 0) / length.to(tl.float32)
        tl.store(out + row.to(tl.int64) * H + h, y.to(out.dtype.element_ty), mask=h < H)


def rows_mean_triton(hidden: Tensor, offsets: Tensor, row_ids: Tensor, out: Tensor) -> None:
    """Launch `rows_mean_kernel`."""
    rows, width = out.shape
    if out.numel():
        rows_mean_kernel[(rows, -(-width // BLOCK_COLUMNS))](
            hidden,
            offsets,
            row_ids,
            out,
            H=width,
            BLOCK_M=BLOCK_TOKENS,
            BLOCK_H=BLOCK_COLUMNS,
            num_warps=4,
            enable_fp_fusion=False,
        )


@torch.no_grad()
def rows_mean_torch(hidden: Tensor, offsets: Tensor, row_ids: Tensor, out: Tensor) -> None:
    """`rows_mean` in torch, row by row, the reference of the Triton back-end."""
    ends = offsets.tolist()
    for row, row_id in enumerate(row_ids.tolist()):
        if row_id >= 0:
            out[row] = hidden[ends[row] : ends[row + 1]].float().mean(dim=0).to(out.dtype)


define("rows_mean", ROWS_MEAN, implementations={"torch": rows_mean_torch, "triton": rows_mean_triton})


def rows_mean(hidden: Tensor, offsets: Tensor, row_ids: Tensor, out: Tensor, *, backend: str = "auto") -> None:
    """Write the mean of the tokens of each present row.

    Sums are float32. Triton adds the tokens of a row in one order, so that the result does not depend on other rows,
    bit for bit.

    Args:
        hidden: ``[2 T, H]``; float32, float16 or bfloat16.
        offsets: ``[R + 1]`` int32, non-decreasing; row i starts at ``hidden[offsets[i]]``.
        row_ids: ``[R]`` int32, -1 for a row that has left or does not exist. On CUDA the values of ids and offsets are
            not checked, since that would synchronise.
        out: ``[R, H]``, dtype of `hidden`, not overlapping it. **Changed** for the present rows.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: shapes, dtypes or devices do not match, or `out` overlaps another tensor; on the CPU also a present
            row without tokens.
        BackendUnavailableError: `backend` cannot run here.

    >>> import torch
    >>> import earlyexit_kernels as ee
    >>> hidden = torch.tensor([[1.0], [2.0], [6.0], [0.0], [0.0], [0.0]])
    >>> offsets, row_ids = torch.tensor([0, 2, 3], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    >>> out = torch.zeros(2, 1)
    >>> ee.ops.rows_mean(hidden, offsets, row_ids, out)
    >>> out[:, 0].tolist()
    [1.5, 6.0]
    """
    op = "rows_mean"
    read = _checked(op, hidden, offsets, row_ids, out)
    bare_op(op, backend, out.device)(*read, out)


@not_traced
def _checked(op: str, hidden: Tensor, offsets: Tensor, row_ids: Tensor, out: Tensor) -> tuple[Tensor, ...]:
    check_tensor(op, "hidden", hidden, (None, None), FLOATS)
    device = hidden.device
    check_present(op, offsets, row_ids, capacity=hidden.shape[0] // 2, device=device)
    shape = (row_ids.shape[0], hidden.shape[1])
    check_tensor(op, "out", out, shape, (hidden.dtype,), written=True, device=device)
    if device.type == "cpu":
        check_no_empty_row(op, row_ids, offsets)
    hidden, offsets, row_ids = hidden.contiguous(), offsets.contiguous(), row_ids.contiguous()
    check_apart(op, {"out": out}, {"hidden": hidden, "offsets": offsets, "row_ids": row_ids})
    return hidden, offsets, row_ids
