"""Linear layer on the first token of each present row: the dense module of a pooler."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from earlyexit_kernels.ops.checks import (
    FLOATS,
    INT32,
    check_apart,
    check_no_empty_row,
    check_offsets,
    check_tensor,
    not_traced,
)
from earlyexit_kernels.ops.schema import FIRST_TOKENS_LINEAR, bare_op, define

#: Activations of the op, by name.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": torch.relu,
    "tanh": torch.tanh,
}


@torch.no_grad()
def first_tokens_linear_torch(
    hidden: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, row_ids: Tensor, out: Tensor, activation: str
) -> None:
    """`first_tokens_linear` in torch, the reference of the compiled kernel."""
    present = row_ids >= 0
    first = hidden[offsets[:-1][present]].float()
    out[present] = ACTIVATIONS[activation](F.linear(first, weight.float(), bias.float())).to(out.dtype)


define(
    "first_tokens_linear",
    FIRST_TOKENS_LINEAR,
    implementations={"torch": first_tokens_linear_torch},
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
    """Write ``f(x W^T + b)`` of the first token of each present row, with sums in float32.

    Args:
        hidden: ``[T, K]``; float32, float16 or bfloat16.
        weight, bias: ``[N, K]`` and ``[N]``, dtype of `hidden`.
        offsets: ``[R + 1]`` int32, non-decreasing; row i starts at ``hidden[offsets[i]]``.
        row_ids: ``[R]`` int32, -1 for a row that has left or does not exist. On CUDA the values of ids and offsets are
            not checked, since that would synchronise.
        out: ``[R, N]``, dtype of `hidden`, not overlapping it. **Changed** for the present rows.
        activation: ``"none"``, ``"gelu"``, ``"gelu_tanh"``, ``"relu"`` or ``"tanh"``.
        backend: ``"auto"``, ``"torch"``, or on the CPU ``"cpp"``, with which the result of a row does not depend on the
            other rows, bit for bit.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: shapes, dtypes or devices do not match, or `out` overlaps another tensor; on the CPU also a present
            row without tokens.
        BackendUnavailableError: `backend` cannot run here.

    >>> import torch
    >>> import earlyexit_kernels as ee
    >>> hidden = torch.tensor([[1.0], [2.0], [3.0]])
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
    check_tensor(op, "weight", weight, (None, hidden.shape[1]), (hidden.dtype,), device=device)
    check_tensor(op, "bias", bias, (weight.shape[0],), (hidden.dtype,), device=device)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: expected activation to be one of {tuple(ACTIVATIONS)}, got {activation!r}")
    check_tensor(op, "row_ids", row_ids, (None,), INT32, device=device)
    rows = row_ids.shape[0]
    check_tensor(op, "offsets", offsets, (rows + 1,), INT32, device=device)
    if device.type == "cpu":
        check_offsets(op, offsets, tokens=hidden.shape[0])
    check_tensor(op, "out", out, (rows, weight.shape[0]), (hidden.dtype,), written=True, device=device)
    if device.type == "cpu":
        check_no_empty_row(op, row_ids, offsets)
    hidden, weight, bias, offsets, row_ids = (x.contiguous() for x in (hidden, weight, bias, offsets, row_ids))
    read = {"hidden": hidden, "weight": weight, "bias": bias, "offsets": offsets, "row_ids": row_ids}
    check_apart(op, {"out": out}, read)
    return hidden, weight, bias, offsets, row_ids
