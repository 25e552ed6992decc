"""`rows_linear` with the bulk copies of Hopper and later GPUs (TMA), for many tokens of half precision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from earlyexit_kernels.backends import clipped_descriptor, constant, jit, tensor_descriptor, tl
from earlyexit_kernels.ops.activations import ACTIVATIONS
from earlyexit_kernels.ops.tiles import (
    BLOCK_DEPTH,
    ENOUGH_TILES,
    Tiles,
    part_terms,
    processors_of,
    resident_programs,
    shared_memory,
)

#: The depth is that of all half-precision tiles. Unmeasured. The widest that fit into registers and shared memory: 192
#: columns share 768 out to four tiles, so that 4096 tokens are one tile for each of an H100's multiprocessors.
TMA_TILES = (
    Tiles(128, 256, BLOCK_DEPTH, warps=8, stages=4, resident=1),
    Tiles(128, 192, BLOCK_DEPTH, warps=8, stages=4, resident=1),
)
#: Columns of a tile's first sums; the others have sums of their own, so that fewer values are converted at a time.
FIRST_COLUMNS = 128
FIRST = constant(FIRST_COLUMNS)
#: Shared memory of a program on GPUs of data centres, in bytes. Consumer GPUs have bulk copies too, but 99 KiB.
SHARED_BYTES = 227 * 1024
#: Alignment that the copies require of memory and of rows, in bytes.
ALIGNMENT = 16
#: Tiles of rows that are computed in turn for the same columns, whose weights are then still in the cache.
GROUP = 8
#: Number of rows that a clipped descriptor seems to have.
CLIPPED_ROWS = constant(1 << 30)


@jit
def rows_linear_tma_kernel(
    x,  # descriptor of [T, K], or of [2 T, K]
    weight,  # descriptor of [N, K], in blocks of FIRST rows
    second_weight,  # the same, in blocks of the other columns of a tile
    out,  # clipped descriptor of [T, N], in blocks of FIRST columns
    second_out,
    bias,  # [N]
    offsets,  # [R + 1] int32
    rows,  # R
    ABSOLUTE: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Persistent programs. Every sum runs over its part of K, BLOCK_K terms per step, as in `product_tile`.

    Where the present tokens have no more tiles of FIRST columns than there are programs, each program computes one of
    those instead of fewer, wider ones. That changes no bit.
    """
    first = tl.load(offsets)
    present = tl.load(offsets + rows) - first
    base = 0
    if ABSOLUTE:
        base = first
    high = tl.cdiv(present, BLOCK_M)
    narrow: tl.constexpr = (N + FIRST - 1) // FIRST
    few = False
    if BLOCK_N < 2 * FIRST:  # the widest tiles leave no registers for a second body
        few = high * narrow <= tl.num_programs(0)
    if few:
        tile = tl.program_id(0)
        if tile < high * narrow:
            token = tile % high * BLOCK_M
            column = tile // high * FIRST
            sums = tl.zeros((BLOCK_M, FIRST), dtype=tl.float32)
            total = tl.zeros((BLOCK_M, FIRST), dtype=tl.float32)
            for k in range(0, K, BLOCK_K):
                sums = tl.dot(x.load([base + token, k]), weight.load([column, k]).T, sums)
                if PART < K:  # noqa: SIM102 - known when the kernel is compiled
                    if (k + BLOCK_K < K) & ((k + BLOCK_K) % PART == 0):
                        total += sums
                        sums = tl.zeros((BLOCK_M, FIRST), dtype=tl.float32)
            if PART < K:
                sums = total + sums
            store_tile(sums, bias, out, token, column, present, N, ACTIVATION, BLOCK_M, FIRST)
    else:
        wide: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
        for tile in tl.range(tl.program_id(0), high * wide, tl.num_programs(0), flatten=True):
            top = tile // (GROUP_M * wide) * GROUP_M
            within = tile % (GROUP_M * wide)
            group = tl.minimum(high - top, GROUP_M)
            token = (top + within % group) * BLOCK_M
            column = within // group * BLOCK_N
            sums = tl.zeros((BLOCK_M, FIRST), dtype=tl.float32)
            second = tl.zeros((BLOCK_M, BLOCK_N - FIRST), dtype=tl.float32)
            total = tl.zeros((BLOCK_M, FIRST), dtype=tl.float32)
            second_total = tl.zeros((BLOCK_M, BLOCK_N - FIRST), dtype=tl.float32)
            for k in range(0, K, BLOCK_K):
                a = x.load([base + token, k])
                sums = tl.dot(a, weight.load([column, k]).T, sums)
                second = tl.dot(a, second_weight.load([column + FIRST, k]).T, second)
                if PART < K:  # noqa: SIM102 - known when the kernel is compiled
                    if (k + BLOCK_K < K) & ((k + BLOCK_K) % PART == 0):
                        total += sums
                        sums = tl.zeros((BLOCK_M, FIRST), dtype=tl.float32)
                        second_total += second
                        second = tl.zeros((BLOCK_M, BLOCK_N - FIRST), dtype=tl.float32)
            if PART < K:
                sums = total + sums
                second = second_total + second
            store_tile(sums, bias, out, token, column, present, N, ACTIVATION, BLOCK_M, FIRST)
            column += FIRST
            store_tile(second, bias, second_out, token, column, present, N, ACTIVATION, BLOCK_M, BLOCK_N - FIRST)


@jit
def store_tile(
    sums,  # [BLOCK_M, COLUMNS] float32
    bias,  # [N]
    out,  # clipped descriptor
    token,  # the first
    column,  # the first
    present,  # number of rows
    N: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the result of the present rows. Rows end at CLIPPED_ROWS, which the copy leaves out of what it writes."""
    n = column + tl.arange(0, COLUMNS)
    sums += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    y = ACTIVATION(sums).to(out.dtype)
    before = CLIPPED_ROWS - present
    out.store([before + present, present, before + token, column], tl.reshape(y, (1, 1, BLOCK_M, COLUMNS)))


def tma_tiles(capacity: int, columns: int, processors: int, in_parts: bool) -> Tiles:
    """Return the tiles of which a multiprocessor reads the least in its turns, for up to `capacity` rows.

    With `in_parts` the narrowest, since every sum needs a second register.
    """

    def read(tiles: Tiles) -> int:
        turns = -(-tiles.count(capacity, columns) // processors)
        return turns * (tiles.rows + tiles.columns)

    return min(TMA_TILES[-1:] if in_parts else TMA_TILES, key=read)


def uses_tma(x: Tensor, weights: Sequence[Tensor], out: Tensor, in_parts: bool) -> bool:
    """Return whether products are faster by `rows_linear_tma_kernel` than by `rows_linear_kernel`.

    Args:
        x: ``[*, K]``.
        weights: each ``[N, K]``.
        out: ``[T, WEIGHTS * N]``, contiguous.
        in_parts: as for `rows_linear`.
    """
    columns = weights[0].shape[0]
    if x.element_size() != 2 or not has_bulk_copies(x.device):
        return False
    tiles = tma_tiles(out.shape[0], columns, processors_of(x.device), in_parts)
    if tiles.count(out.shape[0], columns) < ENOUGH_TILES:
        return False
    addresses = [t.data_ptr() for t in (x, *weights, out)]
    sizes = [size * x.element_size() for size in (x.shape[1], columns, out.shape[1])]
    return all(number % ALIGNMENT == 0 for number in addresses + sizes)


def has_bulk_copies(device: torch.device) -> bool:
    """Return whether a device has them, compute capability 9 or later, and the memory that the tiles need."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < 9:
        return False
    return shared_memory(device) >= SHARED_BYTES


def rows_linear_tma(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    offsets: Tensor,
    out: Tensor,
    activation: str,
    absolute: bool,
    in_parts: bool,
    tiles: Tiles,
) -> None:
    """Launch `rows_linear_tma_kernel` for one weight; the descriptors are of the capacity, and passed by value.

    Args:
        x, bias, offsets, activation, absolute, in_parts: as for `rows_linear`.
        weight: ``[N, K]``.
        out: ``[T, N]``, whose rows may be parts of longer ones.
        tiles: wider than `FIRST_COLUMNS`.
    """
    n, k = weight.shape
    widths = FIRST_COLUMNS, tiles.columns - FIRST_COLUMNS
    rows_linear_tma_kernel[(resident_programs(tiles, out.shape[0], n, out.device),)](
        tensor_descriptor(x, [tiles.rows, tiles.depth]),
        *(tensor_descriptor(weight, [width, tiles.depth]) for width in widths),
        *(clipped_descriptor(out, [tiles.rows, width]) for width in widths),
        bias,
        offsets,
        offsets.numel() - 1,
        ABSOLUTE=absolute,
        N=n,
        K=k,
        ACTIVATION=ACTIVATIONS[activation].device,
        PART=part_terms(k, x.dtype) if in_parts else k,
        GROUP_M=GROUP,
        **tiles.options,
    )
