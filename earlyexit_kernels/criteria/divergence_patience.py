"""Divergence-patience exit.

F-PABEE: Flexible-patience-based Early Exiting for Single-label and Multi-label Text Classification Tasks. Xiangxiang
Gao, Wei Zhu, Jiasheng Gao, Congrui Yin. ICASSP 2023, arXiv 2305.11916: count the consecutive exits whose class
probabilities are close to those of the previous exit; leave where the count reaches the patience. This is the best of
the forms in the paper, with the Jensen-Shannon divergence.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from earlyexit_kernels.arguments import Check
from earlyexit_kernels.backends import constant, jit, tl
from earlyexit_kernels.criteria.base import PATIENCE, TINY, ProbabilityThreshold, softmax
from earlyexit_kernels.criteria.softmax_step import shifted_exp

STEP_TINY = constant(TINY)


@jit
def divergence_term(d):
    """Return f(d) of `divergence_of` in Triton."""
    d2 = d * d
    series = d2 * (1.0 + d2 * (1.0 / 6 + d2 * (1.0 / 15 + d2 * (1.0 / 28 + d2 * (1.0 / 45)))))
    more = (1.0 + d) * tl.log(tl.maximum(1.0 + d, STEP_TINY))
    less = (1.0 - d) * tl.log(tl.maximum(1.0 - d, STEP_TINY))
    return tl.where(d2 < 0.0625, series, more + less)


@jit
def divergence_patience_step(z, aux, cols, classes, state, rows, live, layer, depth, p0, p1, p2):
    _d, e = shifted_exp(z, cols, classes)
    p = e / tl.sum(e, 0)
    at = state + (1 + cols) * rows
    mine = cols < tl.where(live, classes, 0)
    q = tl.load(at, mask=mine, other=0.0)
    both = p + q
    d = tl.where(both > 0, (p - q) / tl.where(both > 0, both, 1.0), 0.0)
    close = (0.25 * tl.sum(both * divergence_term(d), 0) < p0) & (p0 > 0)
    count = tl.where(close, tl.load(state, mask=live, other=0.0) + 1.0, 0.0)
    tl.debug_barrier()
    tl.store(state, count, mask=live)
    tl.store(at, p, mask=mine)
    return z, count >= p1


def divergence_of(p: Tensor, q: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence ``[B]`` in nats of probabilities ``[B, C]``, also where they almost agree.

    With s = p + q and d = (p - q) / s it is the sum over the classes of s f(d) / 4, where
    f(d) = (1 + d) log(1 + d) + (1 - d) log(1 - d). Near d = 0 the two logarithms cancel, so f is computed there as the
    series of d^2k / (k (2k - 1)).
    """
    both = p + q
    d = torch.where(both > 0, (p - q) / both, 0.0)
    d2 = d * d
    series = d2 * (1 + d2 * (1 / 6 + d2 * (1 / 15 + d2 * (1 / 28 + d2 * (1 / 45)))))
    logs = (1 + d) * (1 + d).clamp(min=TINY).log() + (1 - d) * (1 - d).clamp(min=TINY).log()
    return (both * torch.where(d2 < 0.0625, series, logs)).sum(dim=-1) / 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class DivergencePatience(ProbabilityThreshold):
    """Leave where `patience` consecutive exits barely change the class probabilities.

    The earliest such layer is patience + 1.

    Args:
        threshold: of the Jensen-Shannon divergence in nats, which lies in [0, log 2]; in [0, 1], or a list with one
            number for each exit before the last. The comparison is strict: with 0 no row leaves early.
        patience: >= 1.

    Raises:
        ValueError: a threshold is NaN or out of range, or `patience` is not a whole number >= 1.

    Differences from the paper: single-label tasks only.

    Example:
        >>> import torch
        >>> import earlyexit_kernels as ee
        >>> trace = ee.ExitTrace(torch.tensor([[[2.0, 0.0], [0.0, 2.0], [0.0, 2.1], [0.0, 2.1]]]))
        >>> ee.replay(trace, ee.criteria.DivergencePatience(threshold=0.01, patience=1))[1].tolist()
        [3]
    """

    patience: int
    checks: ClassVar[Mapping[str, Check]] = {**ProbabilityThreshold.checks, "patience": PATIENCE}
    name: ClassVar[str] = "divergence_patience"
    triton_step: ClassVar = divergence_patience_step

    def params(self, layer: int) -> list[float]:
        return [*super().params(layer), float(self.patience)]

    def initial_state(self, classes: int) -> tuple[float, ...]:
        # no divergence from NaN is below a threshold: the first exit has no previous one
        return (0.0, *[math.nan] * classes)

    @staticmethod
    def rule(
        z: Tensor, aux: Tensor | None, state: Tensor, layer: int, depth: int, params: Sequence[float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        threshold, patience = params
        p, q = softmax(z), state[1:].T.contiguous()
        close = (divergence_of(p, q) < threshold) & (threshold > 0)
        count = torch.where(close, state[0] + 1.0, 0.0)
        return z, count >= patience, torch.cat((count[None], p.T))
