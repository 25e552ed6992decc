"""``f(x W^T + b)`` tile by tile, which the linear ops share: one tile, its size, and the reference in torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from earlyexit_kernels.backends import jit, tl
from earlyexit_kernels.ops.activations import ACTIVATIONS
from earlyexit_kernels.ops.checks import check_tensor


@dataclass(frozen=True)
class Tiles:
    """How a product is cut up.

    Attributes:
        rows, columns: of a tile.
        depth: terms of a sum that are added at a time.
        warps, stages: of a program.
        resident: programs that a multiprocessor holds at a time.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    resident: int

    def count(self, rows: int, columns: int) -> int:
        """Tiles of an output of this size."""
        return -(-rows // self.rows) * -(-columns // self.columns)

    @property
    def options(self) -> dict[str, Any]:
        """Of a launch of `product_tile`; contracted or not, its epilogue has to round the same in every size."""
        blocks = {"BLOCK_M": self.rows, "BLOCK_N": self.columns, "BLOCK_K": self.depth}
        return {**blocks, "num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": False}


#: (bytes of an element, whether the capacity has many tiles) -> tiles. Unmeasured. 64 rows for each four warps are what
#: Hopper's matrix units take at a time; the depth is one for each dtype, so that every size adds in the same order.
TILES = {
    (2, False): Tiles(64, 64, 64, warps=4, stages=4, resident=3),
    (2, True): Tiles(128, 128, 64, warps=8, stages=3, resident=1),
    (4, False): Tiles(64, 64, 16, warps=4, stages=3, resident=4),
    (4, True): Tiles(128, 128, 16, warps=8, stages=3, resident=1),
}
#: Large tiles from this many on: two for each multiprocessor of an H100.
MANY = 264
#: Stands for the multiprocessors of a GPU in the interpreter.
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
    N: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Each sum runs over K from its beginning, BLOCK_K terms at a time, wherever its tile lies."""
    n = column + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    in_rows = present[:, None]
    in_columns = n[None, :] < N
    from_x = x + source[:, None] * K + k[None, :]
    from_weight = weight + n[None, :].to(tl.int64) * K + k[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        x_mask = in_rows
        weight_mask = in_columns
        if K % BLOCK_K != 0:
            x_mask = in_rows & (k[None, :] < K - start)
            weight_mask = in_columns & (k[:, None] < K - start)
        a = tl.load(from_x + start, mask=x_mask, other=0.0)
        b = tl.load(from_weight + start, mask=weight_mask, other=0.0)
        sums = tl.dot(a, b, sums, input_precision="ieee")
    sums += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    y = ACTIVATION(sums).to(out.dtype.element_ty)
    tl.store(out + target[:, None] * STRIDE + n[None, :], y, mask=in_rows & in_columns)


def tiles_for(dtype: torch.dtype, capacity: int, columns: int) -> Tiles:
    """The tiles of a product of up to `capacity` rows."""
    many = TILES[dtype.itemsize, True].count(capacity, columns) >= MANY
    return TILES[dtype.itemsize, many]


def resident_programs(tiles: Tiles, capacity: int, columns: int, device: torch.device) -> int:
    """Programs that walk the tiles of up to `capacity` rows together: as many as there is work or room for."""
    processors = INTERPRETED_PROCESSORS
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    return min(tiles.count(capacity, columns), processors * tiles.resident)


def product_torch(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    """``f(x W^T + b)`` in float32, the reference of `product_tile`."""
    return ACTIVATIONS[activation].reference(F.linear(x.float(), weight.float(), bias.float()))


def check_product(op: str, x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> None:
    """Raise ValueError where weight, bias and activation of `op` don't fit ``x [*, K]``."""
    check_tensor(op, "weight", weight, (None, x.shape[-1]), (x.dtype,), device=x.device)
    check_tensor(op, "bias", bias, (weight.shape[0],), (x.dtype,), device=x.device)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: expected activation to be one of {tuple(ACTIVATIONS)}, got {activation!r}")
