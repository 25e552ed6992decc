"""Maximum-probability exit.

Confident Adaptive Language Modeling. Tal Schuster et al. NeurIPS 2022, arXiv 2207.07061, and The Right Tool for the
Job. Roy Schwartz et al. ACL 2020, arXiv 2004.07453: leave at the first layer with max_c p(c) >= threshold.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from earlyexit_kernels.backends import jit, tl
from earlyexit_kernels.criteria.base import ProbabilityThreshold, softmax
from earlyexit_kernels.criteria.softmax_step import shifted_exp


@jit
def max_probability_step(z, aux, cols, classes, state, rows, live, layer, depth, p0, p1, p2):
    _d, e = shifted_exp(z, cols, classes)
    return z, 1.0 / tl.sum(e, 0) >= p0


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaxProbability(ProbabilityThreshold):
    """Leave where the largest class probability reaches a threshold.

    Args:
        threshold: in [0, 1], or a list with one number for each exit before the last.

    Raises:
        ValueError: a threshold is NaN or out of range.

    Example:
        >>> import torch
        >>> import earlyexit_kernels as ee
        >>> trace = ee.ExitTrace(torch.tensor([[[1.0, 0.0], [4.0, 0.0], [5.0, 0.0]]]))
        >>> ee.replay(trace, ee.criteria.MaxProbability(threshold=0.9))[1].tolist()
        [2]
    """

    name: ClassVar[str] = "max_probability"
    triton_step: ClassVar = max_probability_step

    @staticmethod
    def rule(
        z: Tensor, aux: Tensor | None, state: Tensor, layer: int, depth: int, params: Sequence[float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        return z, softmax(z).max(dim=-1).values >= params[0], state
