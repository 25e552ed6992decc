"""Energy exit.

COSEE: Consistency-Oriented Signal-Based Early Exiting via Calibrated Sample Weighting Mechanism. Jianing He et al. AAAI
2025, arXiv 2412.13236: leave at the first layer where sigmoid(E) falls below the threshold, E = -log sum_c exp(z_c).
The energy of logits as an exit signal: E-LANG: Energy-Based Joint Inferencing of Super and Swift Language Models.
Mohammad Akbari, Amin Banitalebi-Dehkordi, Yong Zhang. ACL 2022, arXiv 2203.00748.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from earlyexit_kernels.backends import jit, tl
from earlyexit_kernels.criteria.base import ProbabilityThreshold, shifted
from earlyexit_kernels.criteria.softmax_step import shifted_exp


@jit
def energy_step(z, aux, cols, classes, state, rows, live, layer, depth, p0, p1, p2):
    _d, e = shifted_exp(z, cols, classes)
    top = tl.max(tl.where(cols < classes, z, -float("inf")), 0)
    return z, 1.0 / (1.0 + tl.sum(e, 0) * tl.exp(top)) < p0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Energy(ProbabilityThreshold):
    """Leave where the normalised energy of the logits, 1 / (1 + sum_c exp(z_c)), falls below a threshold.

    Unlike the softmax, the energy depends on the scale of the logits.

    Args:
        threshold: in [0, 1], or a list with one number for each exit before the last. The comparison is strict: with 0
            no row leaves early.

    Raises:
        ValueError: a threshold is NaN or out of range.

    Example:
        >>> import torch
        >>> import earlyexit_kernels as ee
        >>> trace = ee.ExitTrace(torch.tensor([[[1.0, 0.0], [4.0, 0.0], [5.0, 0.0]]]))
        >>> ee.replay(trace, ee.criteria.Energy(threshold=0.1))[1].tolist()
        [2]
    """

    name: ClassVar[str] = "energy"
    triton_step: ClassVar = energy_step

    @staticmethod
    def rule(
        z: Tensor, aux: Tensor | None, state: Tensor, layer: int, depth: int, params: Sequence[float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        total = shifted(z).exp().sum(dim=-1) * z.max(dim=-1).values.exp()
        return z, 1.0 / (1.0 + total) < params[0], state
