"""Full depth: no row leaves before the last layer (what `criterion=None` means)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from earlyexit_kernels.backends import jit, tl
from earlyexit_kernels.criteria.base import Criterion
from earlyexit_kernels.types import ANY_TASK


@jit
def full_depth_step(z, aux, cols, classes, state, rows, live, layer, depth, p0, p1, p2):
    return z, tl.min(cols, 0) < 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullDepth(Criterion):
    """Run all layers for every row, and compute only the last exit.

    Example:
        >>> import torch
        >>> import earlyexit_kernels as ee
        >>> ee.replay(ee.ExitTrace(torch.zeros(2, 3, 2)), ee.criteria.FullDepth())[1].tolist()
        [3, 3]
    """

    name: ClassVar[str] = "full_depth"
    tasks: ClassVar[frozenset[str]] = ANY_TASK
    triton_step: ClassVar = full_depth_step

    def is_due(self, layer: int, depth: int) -> bool:
        return layer == depth

    @staticmethod
    def rule(
        z: Tensor, aux: Tensor | None, state: Tensor, layer: int, depth: int, params: Sequence[float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        return z, torch.zeros(z.shape[0], dtype=torch.bool, device=z.device), state
