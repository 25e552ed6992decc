"""Linear layer on the present tokens, whose number only the device knows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from earlyexit_kernels.backends import jit, tl
from earlyexit_kernels.ops.activations import ACTIVATIONS
from earlyexit_kernels.ops.checks import FLOAT32, FLOATS, check_apart, check_present, check_tensor, not_traced
from earlyexit_kernels.ops.rows_linear_tma import GROUP, rows_linear_tma, tma_tiles, uses_tma
from earlyexit_kernels.ops.schema import ROWS_LINEAR, bare_op, define
from earlyexit_kernels.ops.tiles import (
    SUM_PARTS,
    Tiles,
    check_product,
    part_terms,
    parts_torch,
    processors_of,
    product_tile,
    product_torch,
    resident_programs,
    tiles_for,
)

#: Maximum number of weights of a call: query, key and value.
MAX_WEIGHTS = 3


@jit
def rows_linear_kernel(
    x,  # [T, K], or [2 T, K]
    weight,  # [N, K]
    bias,  # [N]
    second_weight,
    second_bias,
    third_weight,
    third_bias,
    offsets,  # [R + 1] int32
    out,  # [T, WEIGHTS * N], or [PARTS, T, N]
    rows,  # R
    capacity,  # T
    WEIGHTS: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,  # side by side; 1 unless only the sums of the parts are written
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Persistent programs, as many as the device holds at a time, which loop over the tiles of the present tokens."""
    first = tl.load(offsets)
    present = tl.load(offsets + rows) - first
    high = tl.cdiv(present, BLOCK_M)
    wide = WEIGHTS * PARTS * tl.cdiv(N, BLOCK_N)
    # what does not change in the loop is kept in registers where that spills none
    for tile in tl.range(tl.program_id(0), high * wide, tl.num_programs(0), disable_licm=WEIGHTS == 1):
        top = tile // (GROUP_M * wide) * GROUP_M
        within = tile % (GROUP_M * wide)
        group = tl.minimum(high - top, GROUP_M)
        token = ((top + within % group) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        source = token
        if ABSOLUTE:
            source = token + first
        column = within // group
        number = column // tl.cdiv(N, BLOCK_N)
        chosen = weight
        chosen_bias = bias
        if WEIGHTS > 1:
            chosen = tl.where(number == 1, second_weight, chosen)
            chosen_bias = tl.where(number == 1, second_bias, chosen_bias)
        if WEIGHTS > 2:
            chosen = tl.where(number == 2, third_weight, chosen)
            chosen_bias = tl.where(number == 2, third_bias, chosen_bias)
        place = out + number * N
        begin = 0
        if PARTS > 1:
            place = out + number.to(tl.int64) * capacity * N
            begin = number * PART
        product_tile(
            x,
            chosen,
            chosen_bias,
            place,
            source,
            token,
            token < present,
            column % tl.cdiv(N, BLOCK_N) * BLOCK_N,
            begin,
            N,
            K,
            WEIGHTS * N,
            ACTIVATION,
            PART,
            PARTS,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )


def rows_linear_triton(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    offsets: Tensor,
    out: Tensor,
    activation: str,
    absolute: bool,
    in_parts: bool,
) -> None:
    """Launch a kernel; it, tiles and programs depend on the capacity, not on the token count."""
    capacity, n, parts = out.shape[-2], weights[0].shape[0], SUM_PARTS if out.dim() == 3 else 1
    if parts == 1 and uses_tma(x, weights, out, in_parts):
        tiles = tma_tiles(capacity, n, processors_of(out.device), in_parts)
        for weight, bias, part in zip(weights, biases, out.split(n, dim=1), strict=True):
            rows_linear_tma(x, weight, bias, offsets, part, activation, absolute, in_parts, tiles)
        return
    tiles = tiles_for(x.dtype, capacity, parts * out.shape[-1], out.device)
    rows_linear_tiled(x, weights, biases, offsets, out, activation, absolute, in_parts, tiles)


def rows_linear_tiled(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    offsets: Tensor,
    out: Tensor,
    activation: str,
    absolute: bool,
    in_parts: bool,
    tiles: Tiles,
) -> None:
    """Launch `rows_linear_kernel`."""
    capacity, rows = out.shape[-2], offsets.numel() - 1
    n, k = weights[0].shape
    parts = SUM_PARTS if out.dim() == 3 else 1
    columns = parts * out.shape[-1]
    programs = resident_programs(tiles, capacity, columns, out.device)
    # the kernel has three pairs of arguments; unused ones are the first pair again
    pairs = [*zip(weights, biases, strict=True)] + [(weights[0], biases[0])] * (MAX_WEIGHTS - len(weights))
    if programs:
        rows_linear_kernel[(programs,)](
            x,
            *itertools.chain.from_iterable(pairs),
            offsets,
            out,
            rows,
            capacity,
            WEIGHTS=len(weights),
            ABSOLUTE=absolute,
            N=n,
            K=k,
            ACTIVATION=ACTIVATIONS[activation].device,
            PART=part_terms(k, x.dtype) if in_parts else k,
            PARTS=parts,
            GROUP_M=GROUP,
            **tiles.options,
        )


@torch.no_grad()
def rows_linear_torch(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    offsets: Tensor,
    out: Tensor,
    activation: str,
    absolute: bool,
    in_parts: bool,
) -> None:
    """`rows_linear` in torch, the reference of the Triton back-end; synchronises to read the token count."""
    first, end = int(offsets[0]), int(offsets[-1])
    tokens = x[first:end] if absolute else x[: end - first]
    if out.dim() == 3:
        out[:, : end - first] = parts_torch(tokens, weights[0])
        return
    products = [product_torch(tokens, *each, activation) for each in zip(weights, biases, strict=True)]
    out[: end - first] = torch.cat(products, dim=1).to(out.dtype)


define("rows_linear", ROWS_LINEAR, implementations={"torch": rows_linear_torch, "triton": rows_linear_triton})


def rows_linear(
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    bias: Tensor | Sequence[Tensor],
    offsets: Tensor,
    out: Tensor,
    *,
    activation: str = "none",
    absolute: bool = False,
    in_parts: bool = False,
    backend: str = "auto",
) -> None:
    """Write ``f(x W^T + b)`` of the present tokens, ``offsets[-1] - offsets[0]`` of them.

    Sums, bias and activation are float32, without TF32. Triton adds each sum over K in one order, whatever T, the token
    count and the position of the token, so that the result of a token does not depend on other tokens, bit for bit.
    Rounding in torch depends on the number of tokens. Tokens of `x` that are not present are not read.

    Args:
        x: ``[T, K]``, the present tokens first; with `absolute` ``[2 T, K]``, the present tokens from ``offsets[0]``
            on. float32, float16 or bfloat16.
        weight, bias: ``[N, K]`` and ``[N]``, dtype of `x`; or up to `MAX_WEIGHTS` of each in one shape, whose products
            are written side by side. The weights are not copied.
        offsets: ``[R + 1]`` int32, non-decreasing. On CUDA the values are not checked, since that would synchronise.
        out: ``[T, N]`` (``[T, 3 N]`` with three weights), dtype of `x`, not overlapping it. **Changed** for the present
            tokens, which it holds first.
        activation: ``"none"``, ``"gelu"``, ``"gelu_tanh"``, ``"relu"`` or ``"tanh"``.
        absolute: whether the present tokens of `x` start at ``offsets[0]``.
        in_parts: whether a sum is that of the `SUM_PARTS` parts of K, each summed by itself and added in order. Then
            `out` may be ``[SUM_PARTS, T, N]`` float32, which receives the sums of the parts without bias for
            `rows_add_norm`: programs share K, and no bit of the norm changes. One weight, no activation.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: shapes, dtypes or devices do not match, or `out` overlaps another tensor.
        BackendUnavailableError: `backend` cannot run here.

    >>> import torch
    >>> import earlyexit_kernels as ee
    >>> x, out = torch.tensor([[1.0], [2.0], [3.0]]), torch.zeros(3, 1)
    >>> offsets = torch.tensor([0, 1, 2], dtype=torch.int32)
    >>> ee.ops.rows_linear(x, torch.tensor([[2.0]]), torch.tensor([1.0]), offsets, out)
    >>> out[:, 0].tolist()
    [3.0, 5.0, 0.0]
    """
    op = "rows_linear"
    x, weights, biases, offsets = _checked(op, x, weight, bias, offsets, out, activation, absolute, in_parts)
    bare_op(op, backend, out.device)(x, weights, biases, offsets, out, activation, absolute, in_parts)


@not_traced
def _checked(
    op: str,
    x: Tensor,
    weight: Any,
    bias: Any,
    offsets: Tensor,
    out: Tensor,
    activation: str,
    absolute: bool,
    in_parts: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    weights, biases = _tensors(op, "weight", weight), _tensors(op, "bias", bias)
    if not 1 <= len(weights) <= MAX_WEIGHTS or len(weights) != len(biases):
        raise ValueError(
            f"{op}: expected 1 to {MAX_WEIGHTS} weights and as many biases, got {len(weights)} and {len(biases)}"
        )
    if in_parts and (len(weights) > 1 or activation != "none"):
        raise ValueError(
            f"{op}: expected one weight and no activation with in_parts, got {len(weights)} and {activation!r}"
        )
    split = in_parts and isinstance(out, Tensor) and out.dim() == 3
    shape = (SUM_PARTS, None, None) if split else (None, None)
    check_tensor(op, "out", out, shape, FLOAT32 if split else FLOATS, written=True)
    device = out.device
    capacity = out.shape[-2]
    check_tensor(
        op, "x", x, (2 * capacity if absolute else capacity, None), FLOATS if split else (out.dtype,), device=device
    )
    for each in zip(weights, biases, strict=True):
        check_product(op, x, *each, activation)
        check_tensor(op, "weight", each[0], tuple(weights[0].shape), FLOATS)
    check_tensor(op, "out", out, (*shape[:-2], capacity, len(weights) * weights[0].shape[0]), FLOATS)
    check_present(op, offsets, None, capacity=capacity, device=device)
    x, offsets = x.contiguous(), offsets.contiguous()
    weights, biases = ([tensor.contiguous() for tensor in each] for each in (weights, biases))
    named = {f"weight[{k}]": tensor for k, tensor in enumerate(weights)}
    named |= {f"bias[{k}]": tensor for k, tensor in enumerate(biases)}
    check_apart(op, {"out": out}, {"x": x, "offsets": offsets, **named})
    return x, weights, biases, offsets


def _tensors(op: str, name: str, given: Any) -> list[Tensor]:
    """Return one tensor, or a list or tuple of tensors, as a list."""
    if isinstance(given, Tensor):
        return [given]
    if isinstance(given, (list, tuple)) and all(isinstance(each, Tensor) for each in given):
        return list(given)
    raise TypeError(f"{op}: expected {name} to be a tensor, got {type(given).__name__}; pass several as a list")
