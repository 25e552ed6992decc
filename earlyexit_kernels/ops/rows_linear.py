"""A linear layer over the tokens present, whose number only the device knows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from earlyexit_kernels.backends import jit, resolve, tl
from earlyexit_kernels.ops.activations import ACTIVATIONS
from earlyexit_kernels.ops.checks import FLOATS, check_apart, check_present, check_tensor
from earlyexit_kernels.ops.schema import PYTHON_BACK_ENDS, ROWS_LINEAR, define
from earlyexit_kernels.ops.tiles import check_product, product_tile, product_torch, resident_programs, tiles_for

#: Tiles of rows that take turns at the same columns, so that those of the weight are still in the cache.
GROUP = 8
#: Weights that one call takes: query, key and value.
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
    out,  # [T, WEIGHTS * N]
    rows,  # R
    WEIGHTS: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """As many programs as the device holds at a time; they walk the tiles of the tokens present."""
    first = tl.load(offsets)
    present = tl.load(offsets + rows) - first
    high = tl.cdiv(present, BLOCK_M)
    wide = WEIGHTS * tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0)
    while tile < high * wide:
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
        product_tile(
            x,
            chosen,
            chosen_bias,
            out + number * N,
            source,
            token,
            token < present,
            column % tl.cdiv(N, BLOCK_N) * BLOCK_N,
            N,
            K,
            WEIGHTS * N,
            ACTIVATION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
        tile += tl.num_programs(0)


def rows_linear_triton(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    offsets: Tensor,
    out: Tensor,
    activation: str,
    absolute: bool,
) -> None:
    """Launch `rows_linear_kernel`; tiles and programs follow from the capacity, never from the count."""
    (capacity, columns), rows = out.shape, offsets.numel() - 1
    n, k = weights[0].shape
    tiles = tiles_for(out.dtype, capacity, columns)
    programs = resident_programs(tiles, capacity, columns, out.device)
    # the kernel names each weight; those it has no use for are the first one again
    pairs = [*zip(weights, biases, strict=True)] + [(weights[0], biases[0])] * (MAX_WEIGHTS - len(weights))
    if programs:
        rows_linear_kernel[(programs,)](
            x,
            *itertools.chain.from_iterable(pairs),
            offsets,
            out,
            rows,
            WEIGHTS=len(weights),
            ABSOLUTE=absolute,
            N=n,
            K=k,
            ACTIVATION=ACTIVATIONS[activation].device,
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
) -> None:
    """`rows_linear` in torch, the reference of the other back-end; it reads the count."""
    first, end = int(offsets[0]), int(offsets[-1])
    tokens = x[first:end] if absolute else x[: end - first]
    products = [product_torch(tokens, *each, activation) for each in zip(weights, biases, strict=True)]
    out[: end - first] = torch.cat(products, dim=1).to(out.dtype)


_ROWS_LINEAR = define(
    "rows_linear",
    ROWS_LINEAR,
    implementations={"torch": rows_linear_torch, "triton": rows_linear_triton},
    back_ends=PYTHON_BACK_ENDS,
)


def rows_linear(
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    bias: Tensor | Sequence[Tensor],
    offsets: Tensor,
    out: Tensor,
    *,
    activation: str = "none",
    absolute: bool = False,
    backend: str = "auto",
) -> None:
    """Write ``f(x W^T + b)`` of the tokens present, ``offsets[-1] - offsets[0]`` of them.

    Args:
        x: ``[T, K]``, the tokens present first; with `absolute` ``[2 T, K]``, and they start at ``offsets[0]``.
            float32, float16 or bfloat16.
        weight, bias: ``[N, K]`` and ``[N]``, dtype of `x`; or as many of each, at most `MAX_WEIGHTS` and of one shape,
            whose products are written side by side. The weights are read where they are, never copied together.
        offsets: ``[R + 1]`` int32. On CUDA they are trusted, since looking would cost a synchronisation.
        out: ``[T, N]`` (``[T, 3 N]`` for three weights), dtype of `x`, apart from it in memory. **Changed** for the
            tokens present, the first ones.
        activation: ``"none"``, ``"gelu"``, ``"gelu_tanh"``, ``"relu"`` or ``"tanh"``.
        absolute: where `x` starts.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Raises:
        ValueError: shapes, dtypes or devices don't fit.
        BackendUnavailableError: `backend` can't run here.

    Sums, bias and activation are float32, without TF32. In triton each sum runs over K in one order, whatever T, the
    count and the token's place, so a token's bits depend on nothing but the token; torch's products round with their
    row count. Nothing of `x` beyond the tokens present is read.
    """
    op = "rows_linear"
    weights, biases = _several(op, "weight", weight), _several(op, "bias", bias)
    if not 1 <= len(weights) <= MAX_WEIGHTS or len(weights) != len(biases):
        raise ValueError(
            f"{op}: expected 1 to {MAX_WEIGHTS} weights and as many biases, got {len(weights)} and {len(biases)}"
        )
    check_tensor(op, "out", out, (None, None), FLOATS, written=True)
    device = out.device
    capacity = out.shape[0]
    check_tensor(op, "x", x, (2 * capacity if absolute else capacity, None), (out.dtype,), device=device)
    for each in zip(weights, biases, strict=True):
        check_product(op, x, *each, activation)
        check_tensor(op, "weight", each[0], tuple(weights[0].shape), FLOATS)
    check_tensor(op, "out", out, (capacity, len(weights) * weights[0].shape[0]), FLOATS)
    check_present(op, offsets, None, capacity=capacity, device=device)
    x, offsets = x.contiguous(), offsets.contiguous()
    weights, biases = ([tensor.contiguous() for tensor in each] for each in (weights, biases))
    named = {f"weight[{k}]": tensor for k, tensor in enumerate(weights)}
    named |= {f"bias[{k}]": tensor for k, tensor in enumerate(biases)}
    check_apart(op, {"out": out}, {"x": x, "offsets": offsets, **named})
    _ROWS_LINEAR[resolve(backend, device.type, PYTHON_BACK_ENDS)](
        x, weights, biases, offsets, out, activation, absolute
    )


def _several(op: str, name: str, given: Any) -> list[Tensor]:
    if isinstance(given, Tensor):
        return [given]
    if isinstance(given, (list, tuple)) and all(isinstance(each, Tensor) for each in given):
        return list(given)
    raise TypeError(f"{op}: expected {name} to be a tensor, got {type(given).__name__}; several are a list of tensors")
