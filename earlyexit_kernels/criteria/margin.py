"""Margin exit.

Confident Adaptive Language Modeling. Tal Schuster et al. NeurIPS 2022, arXiv 2207.07061 ("softmax response"): leave at
the first layer where the two largest class probabilities differ by at least the threshold.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from earlyexit_kernels.backends import jit, tl
from earlyexit_kernels.criteria.base import ProbabilityThreshold, softmax
from earlyexit_kernels.criteria.softmax_step import argmax_lowest, shifted_exp


@jit
def margin_step(z, aux, cols, classes, state, rows, live, layer, depth, p0, p1, p2):
    _d, e = shifted_exp(z, cols, classes)
    best = argmax_lowest(z, cols, classes)
    second = tl.max(tl.where(cols == best, 0.0, e), 0)
    return z, (1.0 - second) / tl.sum(e, 0) >= p0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Margin(ProbabilityThreshold):
    """Leave where the difference of the two largest class probabilities reaches a threshold.

    Args:
        threshold: of the difference, in [0, 1], or a list with one number for each exit before the last.

    Raises:
        ValueError: a threshold is NaN or out of range.

    Example:
        >>> import torch
        >>> import earlyexit_kernels as ee
        >>> trace = ee.ExitTrace(torch.tensor([[[1.0, 0.0], [4.0, 0.0], [5.0, 0.0]]]))
        >>> ee.replay(trace, ee.criteria.Margin(threshold=0.8))[1].tolist()
        [2]
    """

    name: ClassVar[str] = "margin"
    triton_step: ClassVar = margin_step

    @staticmethod
    def rule(
        z: Tensor, aux: Tensor | None, state: Tensor, layer: int, depth: int, params: Sequence[float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        top = softmax(z).topk(2, dim=-1).values
        return z, top[:, 0] - top[:, 1] >= params[0], state
