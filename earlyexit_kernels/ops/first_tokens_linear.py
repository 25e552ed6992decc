"""Linear layer on the first token of each present row: the dense module of a pooler."""

from __future__ import annotations

import torch
from torch import Tensor

from earlyexit_kernels.backends import jit, tl
from earlyexit_kernels.ops.activations import ACTIVATIONS
from earlyexit_kernels.ops.checks import (
    FLOATS,
    check_apart,
    check_no_empty_row,
    check_present,
    check_tensor,
    not_traced,
)
from earlyexit_kernels.ops.schema import FIRST_TOKENS_LINEAR, bare_op, define
from earlyexit_kernels.ops.tiles import check_product, product_tile, product_torch, tiles_for


@jit
def first_tokens_linear_kernel(
    hidden,  # [2 T, K]
    weight,  # [N, K]
    bias,  # [N]
    offsets,  # [R + 1] int32
    row_ids,  # [R] int32
    out,  # [R, N]
    rows,  # R
    N: tl.constexpr,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per tile, which returns at once if all its rows have left."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    present = tl.load(row_ids + row, mask=row < rows, other=-1) >= 0
    if tl.sum(present.to(tl.int32), 0) > 0:
        token = tl.load(offsets + row, mask=present, other=0).to(tl.int64)
        column = tl.program_id(1) * BLOCK_N
        product_tile(
            hidden,
            weight,
            bias,
            out,
            token,
            row.to(tl.int64),
            present,
            column,
            0,
            N,
            K,
            N,
            ACTIVATION,
            K,
            1,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )


def first_tokens_linear_triton(
    hidden: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, row_ids: Tensor, out: Tensor, activation: str
) -> None:
    """Launch `first_tokens_linear_kernel`."""
    rows, n = out.shape
    tiles = tiles_for(out.dtype, rows, n, out.device)
    grid = (-(-rows // tiles.rows), -(-n // tiles.columns))
    if rows and n:
        first_tokens_linear_kernel[grid](
            hidden,
            weight,
            bias,
            offsets,
            row_ids,
            out,
            rows,
            N=n,
            K=weight.shape[1],
            ACTIVATION=ACTIVATIONS[activation].device,
            **tiles.options,
        )


@torch.no_grad()
def first_tokens_linear_torch(
    hidden: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, row_ids: Tensor, out: Tensor, activation: str
) -> None:
    """`first_tokens_linear` in torch, the reference of the other back-ends."""
    present = row_ids >= 0
    out[present] = product_torch(hidden[offsets[:-1][present]], weight, bias, activation).to(out.dtype)


define(
    "first_tokens_linear",
    FIRST_TOKENS_LINEAR,
    implementations={"torch": first_tokens_linear_torch, "triton": first_tokens_linear_triton},
    compiled_for=("cpu",),
)


def first_tokens_linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    offsets: Tensor,
    row_ids: Tensor,
    out: Tensor,
    *,
    activation: str = "none",
    backend: str = "auto",
) -> None:
    """Write ``f(x W^T + b)`` of the first token of each present row, with the arithmetic of `rows_linear`.

    Args:
        hidden: ``[2 T, K]``; float32, float16 or bfloat16.
        weight, bias: ``[N, K]`` and ``[N]``, dtype of `hidden`.
        offsets: ``[R + 1]`` int32, non-decreasing; row i starts at ``hidden[offsets[i]]``.
        row_ids: ``[R]`` int32, -1 for a row that has left or does not exist. On CUDA the values of ids and offsets are
            not checked, since that would synchronise.
        out: ``[R, N]``, dtype of `hidden`, not overlapping it. **Changed** for the present rows.
        activation: as in `rows_linear`.
        backend: ``"auto"``, ``"torch"``, ``"triton"``, or on the CPU ``"cpp"``, with which the result of a row does not
            depend on the other rows, bit for bit.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: shapes, dtypes or devices do not match, or `out` overlaps another tensor; on the CPU also a present
            row without tokens.
        BackendUnavailableError: `backend` cannot run here.

    >>> import torch
    >>> import earlyexit_kernels as ee
    >>> hidden = torch.tensor([[1.0], [2.0], [3.0], [0.0], [0.0], [0.0]])
    >>> offsets, row_ids = torch.tensor([0, 2, 3], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    >>> out = torch.zeros(2, 1)
    >>> ee.ops.first_tokens_linear(hidden, torch.tensor([[10.0]]), torch.tensor([1.0]), offsets, row_ids, out)
    >>> out[:, 0].tolist()
    [11.0, 31.0]
    """
    op = "first_tokens_linear"
    read = _checked(op, hidden, weight, bias, offsets, row_ids, out, activation)
    bare_op(op, backend, out.device)(*read, out, activation)


@not_traced
def _checked(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    offsets: Tensor,
    row_ids: Tensor,
    out: Tensor,
    activation: str,
) -> tuple[Tensor, ...]:
    check_tensor(op, "hidden", hidden, (None, None), FLOATS)
    device = hidden.device
    check_product(op, hidden, weight, bias, activation)
    check_present(op, offsets, row_ids, capacity=hidden.shape[0] // 2, device=device)
    shape = (row_ids.shape[0], weight.shape[0])
    check_tensor(op, "out", out, shape, (hidden.dtype,), written=True, device=device)
    if device.type == "cpu":
        check_no_empty_row(op, row_ids, offsets)
    hidden, weight, bias, offsets, row_ids = (x.contiguous() for x in (hidden, weight, bias, offsets, row_ids))
    read = {"hidden": hidden, "weight": weight, "bias": bias, "offsets": offsets, "row_ids": row_ids}
    check_apart(op, {"out": out}, read)
    return hidden, weight, bias, offsets, row_ids
