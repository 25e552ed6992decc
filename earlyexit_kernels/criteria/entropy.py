"""Entropy exit.

DeeBERT: Dynamic Early Exiting for Accelerating BERT Inference. Ji Xin, Raphael Tang, Jaejun Lee, Yaoliang Yu, Jimmy
Lin. ACL 2020, arXiv 2004.12993: leave at the first layer with H(p) < S, H in nats.
FastBERT: a Self-distilling BERT with Adaptive Inference Time. Weijie Liu et al. ACL 2020, arXiv 2004.02178: the same on
H(p) / log C (`normalized=True`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from earlyexit_kernels.backends import jit, tl
from earlyexit_kernels.criteria.base import Criterion, Threshold, checked_threshold, entropy_nats, threshold_at
from earlyexit_kernels.criteria.softmax_step import entropy_nats_of


@jit
def entropy_step(z, aux, cols, classes, state, rows, live, layer, depth, p0, p1, p2):
    scale = tl.where(p1 > 0, tl.log(tl.cast(classes, tl.float32)), 1.0)
    return z, entropy_nats_of(z, cols, classes) < p0 * scale


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entropy(Criterion):
    """Leave where the entropy of the exit's class probabilities falls below a threshold.

    Args:
        threshold: nats, at least 0 (or a share of log C in [0, 1] with `normalized`); 0 never leaves early. A list
            gives one for each exit before the last. Comparison is strict, as in DeeBERT; FastBERT's batched code
            uses <=, which differs on equality only.
        normalized: divide by log C, as FastBERT does. Thresholds of the two scales aren't comparable.

    Raises:
        ValueError: a threshold is NaN, infinite or out of range.
    """

    threshold: Threshold
    normalized: bool = False
    name: ClassVar[str] = "entropy"
    triton_step: ClassVar = entropy_step

    def __post_init__(self) -> None:
        if not isinstance(self.normalized, bool):
            raise ValueError(f"Entropy(normalized=...): expected True or False, got {self.normalized!r}")
        high = 1.0 if self.normalized else math.inf
        object.__setattr__(self, "threshold", checked_threshold("Entropy", self.threshold, low=0.0, high=high))

    def params(self, layer: int) -> list[float]:
        return [threshold_at(self.threshold, layer), float(self.normalized)]

    @staticmethod
    def rule(
        z: Tensor, aux: Tensor | None, state: Tensor, layer: int, depth: int, params: Sequence[float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        scale = math.log(z.shape[1]) if params[1] > 0 else 1.0
        return z, entropy_nats(z) < params[0] * scale, state
