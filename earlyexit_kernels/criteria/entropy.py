"""Entropy exit.

DeeBERT: Dynamic Early Exiting for Accelerating BERT Inference. Ji Xin, Raphael Tang, Jaejun Lee, Yaoliang Yu, Jimmy
Lin. ACL 2020, arXiv 2004.12993: leave at the first layer with H(p) < S, H in nats.
FastBERT: a Self-distilling BERT with Adaptive Inference Time. Weijie Liu et al. ACL 2020, arXiv 2004.02178: the same on
H(p) / log C (`normalized=True`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from earlyexit_kernels.arguments import Check, check_fields, flag, number, one_or_each
from earlyexit_kernels.backends import jit, tl
from earlyexit_kernels.criteria.base import Criterion, Threshold, entropy_nats, threshold_at
from earlyexit_kernels.criteria.softmax_step import entropy_nats_of


@jit
def entropy_step(z, aux, cols, classes, state, rows, live, layer, depth, p0, p1, p2):
    scale = tl.where(p1 > 0, tl.log(tl.cast(classes, tl.float32)), 1.0)
    return z, entropy_nats_of(z, cols, classes) < p0 * scale


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entropy(Criterion):
    """Leave where the entropy of the exit's class probabilities falls below a threshold.

    Args:
        threshold: in nats, at least 0 (with `normalized` a share of log C in [0, 1]), or a list with one number for
            each exit before the last. The comparison is strict, as in DeeBERT: with 0 no row leaves early. FastBERT's
            batched code uses <=, which differs on equality only.
        normalized: divide by log C, as FastBERT does. Thresholds of the two scales are not comparable.

    Raises:
        ValueError: a threshold is NaN, infinite or out of range.

    Example:
        >>> import torch
        >>> import earlyexit_kernels as ee
        >>> trace = ee.ExitTrace(torch.tensor([[[1.0, 0.0], [4.0, 0.0], [5.0, 0.0]]]))
        >>> ee.replay(trace, ee.criteria.Entropy(threshold=0.3))[1].tolist()
        [2]
    """

    threshold: Threshold
    normalized: bool = False
    checks: ClassVar[Mapping[str, Check]] = {"threshold": one_or_each(number(low=0.0)), "normalized": flag}
    name: ClassVar[str] = "entropy"
    triton_step: ClassVar = entropy_step

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalized:
            check_fields(self, {"threshold": one_or_each(number(low=0.0, high=1.0))})

    def params(self, layer: int) -> list[float]:
        return [threshold_at(self.threshold, layer), float(self.normalized)]

    @staticmethod
    def rule(
        z: Tensor, aux: Tensor | None, state: Tensor, layer: int, depth: int, params: Sequence[float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        scale = math.log(z.shape[1]) if params[1] > 0 else 1.0
        return z, entropy_nats(z) < params[0] * scale, state
