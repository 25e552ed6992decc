"""A fixed cut.

Source: this package. Every row leaves after one layer, which is how a smaller model with the same exit answers: the
baseline that a rule which looks at the rows has to beat.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from earlyexit_kernels.arguments import Check, whole
from earlyexit_kernels.backends import jit, tl
from earlyexit_kernels.criteria.base import MAX_COUNT, Criterion
from earlyexit_kernels.types import ANY_TASK


@jit
def fixed_layer_step(z, aux, cols, classes, state, rows, live, layer, depth, p0, p1, p2):
    return z, tl.min(cols, 0) + layer >= p0


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedLayer(Criterion):
    """Leave after one layer, whatever the exit says, and compute no exit before it.

    `model.truncate(layer)` is the model without the layers above.

    Args:
        layer: 1-based; a model of fewer layers runs them all.

    Raises:
        ValueError: `layer` is not a whole number >= 1.

    Example:
        >>> import torch
        >>> import earlyexit_kernels as ee
        >>> ee.replay(ee.ExitTrace(torch.zeros(2, 3, 2)), ee.criteria.FixedLayer(layer=2))[1].tolist()
        [2, 2]
    """

    layer: int
    checks: ClassVar[Mapping[str, Check]] = {
        "layer": whole(low=1, high=MAX_COUNT, hint=" (criterion=None runs all layers)")
    }
    name: ClassVar[str] = "fixed_layer"
    tasks: ClassVar[frozenset[str]] = ANY_TASK
    triton_step: ClassVar = fixed_layer_step

    def params(self, layer: int) -> list[float]:
        return [float(self.layer)]

    def is_due(self, layer: int, depth: int) -> bool:
        return layer >= min(self.layer, depth)

    @staticmethod
    def rule(
        z: Tensor, aux: Tensor | None, state: Tensor, layer: int, depth: int, params: Sequence[float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        return z, torch.full(z.shape[:1], layer >= params[0], dtype=torch.bool, device=z.device), state
