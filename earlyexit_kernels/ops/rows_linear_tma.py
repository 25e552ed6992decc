"""`rows_linear` with the bulk copies of Hopper and later GPUs (TMA), for many tokens of half precision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from earlyexit_kernels.backends import jit, tensor_descriptor, tl
from earlyexit_kernels.ops.activations import ACTIVATIONS
from earlyexit_kernels.ops.tiles import BLOCK_DEPTH, ENOUGH_TILES, Tiles, resident_programs

#: The depth is that of all half-precision tiles. Unmeasured. Larger tiles leave no shared memory for the last one.
TMA_TILES = Tiles(128, 128, BLOCK_DEPTH, warps=8, stages=4, resident=1)
#: Alignment that the copies require of memory and of rows, in bytes.
ALIGNMENT = 16
#: Tiles of rows that are computed in turn for the same columns, whose weights are then still in the cache.
GROUP = 8


@jit
def rows_linear_tma_kernel(
    x,  # descriptor of [T, K], or of [2 T, K]
    weight,  # descriptor of [N, K]
    out,  # descriptor of [T, N]
    out_memory,  # of `out`, for the tile in which the present tokens end
    bias,  # [N]
    offsets,  # [R + 1] int32
    rows,  # R
    stride,  # of `out`
    ABSOLUTE: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Persistent programs. Every sum runs over K from its beginning, BLOCK_K terms per step, as in `product_tile`."""
    first = tl.load(offsets)
    present = tl.load(offsets + rows) - first
    base = 0
    if ABSOLUTE:
        base = first
    high = tl.cdiv(present, BLOCK_M)
    wide: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    for tile in tl.range(tl.program_id(0), high * wide, tl.num_programs(0), flatten=True):
        top = tile // (GROUP_M * wide) * GROUP_M
        within = tile % (GROUP_M * wide)
        group = tl.minimum(high - top, GROUP_M)
        token = (top + within % group) * BLOCK_M
        column = within // group * BLOCK_N
        sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, K, BLOCK_K):
            sums = tl.dot(x.load([base + token, k]), weight.load([column, k]).T, sums)
        n = column + tl.arange(0, BLOCK_N)
        sums += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        y = ACTIVATION(sums).to(out_memory.dtype.element_ty)
        if token + BLOCK_M <= present:
            out.store([token, column], y)
        else:
            m = token + tl.arange(0, BLOCK_M)
            at = out_memory + m[:, None].to(tl.int64) * stride + n[None, :]
            tl.store(at, y, mask=(m[:, None] < present) & (n[None, :] < N))


def uses_tma(x: Tensor, weights: Sequence[Tensor], out: Tensor) -> bool:
    """Return whether products are faster by `rows_linear_tma_kernel` than by `rows_linear_kernel`.

    Args:
        x: ``[*, K]``.
        weights: each ``[N, K]``.
        out: ``[T, WEIGHTS * N]``, contiguous.
    """
    columns = weights[0].shape[0]
    if x.element_size() != 2 or not has_bulk_copies(x.device):
        return False
    if TMA_TILES.count(out.shape[0], columns) < ENOUGH_TILES:
        return False
    addresses = [t.data_ptr() for t in (x, *weights, out)]
    sizes = [size * x.element_size() for size in (x.shape[1], columns, out.shape[1])]
    return all(number % ALIGNMENT == 0 for number in addresses + sizes)


def has_bulk_copies(device: torch.device) -> bool:
    """Return whether a device has them: compute capability 9 or later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def rows_linear_tma(
    x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, out: Tensor, activation: str, absolute: bool
) -> None:
    """Launch `rows_linear_tma_kernel` for one weight; the descriptors are of the capacity, and passed by value.

    Args:
        x, bias, offsets, activation, absolute: as for `rows_linear`.
        weight: ``[N, K]``.
        out: ``[T, N]``, whose rows may be parts of longer ones.
    """
    (n, k), tiles = weight.shape, TMA_TILES
    rows_linear_tma_kernel[(resident_programs(tiles, out.shape[0], n, out.device),)](
        tensor_descriptor(x, [tiles.rows, tiles.depth]),
        tensor_descriptor(weight, [tiles.columns, tiles.depth]),
        tensor_descriptor(out, [tiles.rows, tiles.columns]),
        out,
        bias,
        offsets,
        offsets.numel() - 1,
        out.stride(0),
        ABSOLUTE=absolute,
        N=n,
        K=k,
        ACTIVATION=ACTIVATIONS[activation].device,
        GROUP_M=GROUP,
        **tiles.options,
    )
