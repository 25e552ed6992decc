"""Divergence patience.

F-PABEE: Flexible-patience-based Early Exiting for Single-label and Multi-label Text Classification Tasks. Xiangxiang
Gao, Wei Zhu, Jiasheng Gao, Congrui Yin. ICASSP 2023, arXiv 2305.11916: count the exits in a row whose class
probabilities lie close to those of the exit before; leave where the count reaches the patience. This is the form that
did best there, with the Jensen-Shannon divergence.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from earlyexit_kernels.backends import jit, tl
from earlyexit_kernels.criteria.base import MOST_COUNTED, ProbabilityThreshold, checked_whole, softmax
from earlyexit_kernels.criteria.softmax_step import shifted_exp


@jit
def divergence_patience_step(z, aux, cols, classes, state, rows, live, layer, depth, p0, p1, p2):
    _d, e = shifted_exp(z, cols, classes)
    p = e / tl.sum(e, 0)
    at = state + (1 + cols) * rows
    mine = cols < tl.where(live, classes, 0)
    q = tl.load(at, mask=mine, other=0.0)
    both = p + q
    apart = tl.where(p > 0, p * tl.log(2.0 * p / both), 0.0) + tl.where(q > 0, q * tl.log(2.0 * q / both), 0.0)
    close = (0.5 * tl.sum(apart, 0) < p0) & (p0 > 0)
    count = tl.where(close, tl.load(state, mask=live, other=0.0) + 1.0, 0.0)
    tl.debug_barrier()
    tl.store(state, count, mask=live)
    tl.store(at, p, mask=mine)
    return z, count >= p1


@dataclasses.dataclass(frozen=True, kw_only=True)
class DivergencePatience(ProbabilityThreshold):
    """Leave where `patience` exits in a row hardly move the class probabilities: at layer patience + 1 or later.

    Args:
        threshold: of the Jensen-Shannon divergence in nats, which lies in [0, log 2]; in [0, 1], or a list with one
            for each exit before the last. Strict, so that 0 never leaves early.
        patience: >= 1.

    Raises:
        ValueError: a threshold is NaN or out of range, or `patience` isn't a whole number >= 1.

    Differences from the paper: single-label tasks only.
    """

    patience: int
    name: ClassVar[str] = "divergence_patience"
    triton_step: ClassVar = divergence_patience_step

    def __post_init__(self) -> None:
        super().__post_init__()
        patience = checked_whole("DivergencePatience", "patience", self.patience, low=1, high=MOST_COUNTED)
        object.__setattr__(self, "patience", patience)

    def params(self, layer: int) -> list[float]:
        return [*super().params(layer), float(self.patience)]

    def initial_state(self, classes: int) -> tuple[float, ...]:
        # nothing is close to NaN, so the first exit agrees with no exit before it
        return (0.0, *[math.nan] * classes)

    @staticmethod
    def rule(
        z: Tensor, aux: Tensor | None, state: Tensor, layer: int, depth: int, params: Sequence[float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        threshold, patience = params
        p, q = softmax(z), state[1:].T.contiguous()
        both = p + q
        apart = torch.where(p > 0, p * (2 * p / both).log(), 0.0) + torch.where(q > 0, q * (2 * q / both).log(), 0.0)
        close = (0.5 * apart.sum(dim=-1) < threshold) & (threshold > 0)
        count = torch.where(close, state[0] + 1.0, 0.0)
        return z, count >= patience, torch.cat((count[None], p.T))
