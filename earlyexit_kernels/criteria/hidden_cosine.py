"""Hidden-state saturation.

Confident Adaptive Language Modeling. Tal Schuster et al. NeurIPS 2022, arXiv 2207.07061 ("hidden-state saturation"):
leave at the first layer whose hidden state has a cosine of at least the threshold with that of the previous layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from earlyexit_kernels.arguments import Check, number, one_or_each
from earlyexit_kernels.backends import jit, tl  # noqa: F401, the interpreter requires tl in the module of a step
from earlyexit_kernels.criteria.base import Criterion, Threshold, threshold_at
from earlyexit_kernels.types import ANY_TASK


@jit
def hidden_cosine_step(z, aux, cols, classes, state, rows, live, layer, depth, p0, p1, p2):
    return z, aux >= p0


@dataclasses.dataclass(frozen=True, kw_only=True)
class HiddenCosine(Criterion):
    """Leave where a layer barely changes the direction of the pooled hidden state.

    It requires no training and is defined for every task. The states are pooled as by the exits: the mean over the
    row's tokens with ``pooling="mean"``, else the first token. Layer 1 is compared with the pooled embeddings.

    Args:
        threshold: in [-1, 1], or a list with one number for each exit before the last.

    Raises:
        ValueError: a threshold is NaN or out of range.

    Differences from the paper: there the states of a decoder's token are compared.

    Example:
        >>> import torch
        >>> import earlyexit_kernels as ee
        >>> trace = ee.ExitTrace(torch.zeros(1, 3, 2), {"hidden_cosine": torch.tensor([[0.1, 0.9, 0.95]])})
        >>> ee.replay(trace, ee.criteria.HiddenCosine(threshold=0.8))[1].tolist()
        [2]
    """

    threshold: Threshold
    checks: ClassVar[Mapping[str, Check]] = {"threshold": one_or_each(number(low=-1.0, high=1.0))}
    name: ClassVar[str] = "hidden_cosine"
    needs: ClassVar[str | None] = "hidden_cosine"
    tasks: ClassVar[frozenset[str]] = ANY_TASK
    triton_step: ClassVar = hidden_cosine_step

    def params(self, layer: int) -> list[float]:
        return [threshold_at(self.threshold, layer)]

    @staticmethod
    def rule(
        z: Tensor, aux: Tensor | None, state: Tensor, layer: int, depth: int, params: Sequence[float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert aux is not None
        return z, aux >= params[0], state
