"""``f(x W^T + b)`` by tiles, shared by the linear ops: one tile, its size, and the reference in torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from earlyexit_kernels.backends import jit, tl
from earlyexit_kernels.ops.activations import ACTIVATIONS
from earlyexit_kernels.ops.checks import check_tensor


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of a matrix product.

    Attributes:
        rows, columns: size of a tile.
        depth: terms of a sum per step.
        warps, stages: per program.
        resident: programs per multiprocessor.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    resident: int

    def count(self, rows: int, columns: int) -> int:
        """Return the number of tiles of an output."""
        return -(-rows // self.rows) * -(-columns // self.columns)

    def shared_bytes(self, itemsize: int) -> int:
        """Return the shared memory of a program for elements of this many bytes."""
        return self.stages * (self.rows + self.columns) * self.depth * itemsize

    def fitted(self, itemsize: int, shared_bytes: int) -> Tiles:
        """Return these tiles with as many stages as fit into the shared memory of a program, at least two."""
        stage = self.shared_bytes(itemsize) // self.stages
        return replace(self, stages=max(2, min(self.stages, shared_bytes // stage)))

    @property
    def options(self) -> dict[str, Any]:
        """Launch options of `product_tile`, without FMA contraction, so that all sizes round the same."""
        blocks = {"BLOCK_M": self.rows, "BLOCK_N": self.columns, "BLOCK_K": self.depth}
        return {**blocks, "num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": False}


#: Terms of a sum per step in half precision, in all kernels, so that all add in the same order.
BLOCK_DEPTH = 64
#: Bytes per element -> tiles, the largest first. Unmeasured. 64 rows per four warps match Hopper's matrix units; the
#: depth is the same for all sizes of a dtype, so that all add in the same order. Few tiles hide the latency of memory
#: by many stages.
TILES = {
    2: (
        Tiles(128, 128, BLOCK_DEPTH, warps=8, stages=3, resident=1),
        Tiles(64, 64, BLOCK_DEPTH, warps=8, stages=8, resident=1),
        Tiles(64, 32, BLOCK_DEPTH, warps=4, stages=10, resident=1),
        Tiles(64, 16, BLOCK_DEPTH, warps=4, stages=12, resident=1),
    ),
    4: (
        Tiles(128, 64, 16, warps=8, stages=3, resident=2),
        Tiles(64, 64, 16, warps=4, stages=3, resident=4),
    ),
}
#: Parts of K, each a sum of its own, of a product `in_parts`; the sums of the parts are added in order.
SUM_PARTS = 4
#: The largest tiles are chosen of which there are as many: half of the multiprocessors of an H100.
ENOUGH_TILES = 66
#: Bytes of shared memory of a program that are left to Triton.
RESERVED_BYTES = 1024
#: Number of multiprocessors assumed in the interpreter.
INTERPRETED_PROCESSORS = 3


@jit
def product_tile(
    x,  # [*, K]
    weight,  # [N, K]
    bias,  # [N]
    out,  # [*, STRIDE], at its first column of this weight
    source,  # [BLOCK_M] int64, row of x
    target,  # [BLOCK_M] int64, row of out
    present,  # [BLOCK_M], whether there is such a row
    column,  # of this weight, the first
    begin,  # the first term of the sums; 0 unless PARTS > 1
    N: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PART: tl.constexpr,  # terms of a part of K; at least K if there is one part
    PARTS: tl.constexpr,  # 1, or more if the sums are those of one part, without bias and activation
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Every sum of a part runs from its beginning, BLOCK_K terms per step, whatever the position of the tile.

    The sums of the parts are added in order, here or, with PARTS, by `rows_add_norm`.
    """
    n = column + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    in_rows = present[:, None]
    in_columns = n[None, :] < N
    from_x = x + source[:, None] * K + begin + k[None, :]
    from_weight = weight + n[None, :].to(tl.int64) * K + begin + k[:, None]
    terms: tl.constexpr = PART if PARTS > 1 else K
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if terms > PART:
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, terms, BLOCK_K):
        x_mask = in_rows
        weight_mask = in_columns
        if K % BLOCK_K != 0 or (PARTS > 1 and PARTS * PART != K):
            x_mask = in_rows & (k[None, :] < K - begin - start)
            weight_mask = in_columns & (k[:, None] < K - begin - start)
        a = tl.load(from_x + start, mask=x_mask, other=0.0)
        b = tl.load(from_weight + start, mask=weight_mask, other=0.0)
        sums = tl.dot(a, b, sums, input_precision="ieee")
        if terms > PART:  # noqa: SIM102 - known when the kernel is compiled
            if (start + BLOCK_K < terms) & ((start + BLOCK_K) % PART == 0):
                total += sums
                sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if terms > PART:
        sums = total + sums
    if PARTS == 1:
        sums = ACTIVATION(sums + tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :])
    y = sums.to(out.dtype.element_ty)
    tl.store(out + target[:, None] * STRIDE + n[None, :], y, mask=in_rows & in_columns)


def part_terms(k: int, dtype: torch.dtype) -> int:
    """Return the number of terms of a part of K: whole steps of all tiles, shared out to `SUM_PARTS` parts."""
    depth = TILES[dtype.itemsize][0].depth
    return max(1, -(-k // (SUM_PARTS * depth))) * depth


def few_tiles(dtype: torch.dtype, capacity: int, columns: int) -> bool:
    """Return whether the parts of a product are faster side by side: the largest tiles leave multiprocessors idle."""
    return TILES[dtype.itemsize][0].count(capacity, columns) < ENOUGH_TILES


def tiles_for(dtype: torch.dtype, capacity: int, columns: int, device: torch.device) -> Tiles:
    """Return the tiles for a product of up to `capacity` rows, with as many stages as the device has memory for."""
    sizes = TILES[dtype.itemsize]
    found = next((tiles for tiles in sizes if tiles.count(capacity, columns) >= ENOUGH_TILES), sizes[-1])
    if device.type != "cuda":
        return found
    return found.fitted(dtype.itemsize, shared_memory(device) - RESERVED_BYTES)


def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that a program can have on a CUDA device."""
    card = torch.cuda.get_device_properties(device)
    return getattr(card, "shared_memory_per_block_optin", card.shared_memory_per_block)


def processors_of(device: torch.device) -> int:
    """Return the number of multiprocessors of a device."""
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def resident_programs(tiles: Tiles, capacity: int, columns: int, device: torch.device) -> int:
    """Return the number of persistent programs for up to `capacity` rows, limited by the tiles and the device."""
    return min(tiles.count(capacity, columns), processors_of(device) * tiles.resident)


def looping_programs(items: int, resident: int, device: torch.device) -> int:
    """Return the number of persistent programs that loop over up to this many items.

    Their loops leave loop-invariant addresses where they are (``disable_licm``): held in registers, they would leave
    room for fewer programs.

    Args:
        items: of the capacity, of which few may be present.
        resident: programs per multiprocessor, as many as have room for their registers, or a multiple of that.
        device: of the launch.
    """
    return min(items, processors_of(device) * resident)


def product_torch(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    """Return ``f(x W^T + b)`` in float32, the reference of `product_tile`."""
    return ACTIVATIONS[activation].reference(F.linear(x.float(), weight.float(), bias.float()))


def parts_torch(x: Tensor, weight: Tensor) -> Tensor:
    """Return the sums of the parts of K, ``[SUM_PARTS, T, N]`` float32, the reference of `product_tile` with PARTS."""
    part = part_terms(weight.shape[1], weight.dtype)
    starts = range(0, SUM_PARTS * part, part)
    return torch.stack([F.linear(*(y[:, start : start + part].float() for y in (x, weight))) for start in starts])


def check_product(op: str, x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> None:
    """Raise ValueError if weight, bias or activation of `op` do not match ``x [*, K]``."""
    check_tensor(op, "weight", weight, (None, x.shape[-1]), (x.dtype,), device=x.device)
    check_tensor(op, "bias", bias, (weight.shape[0],), (x.dtype,), device=x.device)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: expected activation to be one of {tuple(ACTIVATIONS)}, got {activation!r}")
