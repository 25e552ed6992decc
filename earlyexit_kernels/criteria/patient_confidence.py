"""Patient-confidence exit.

PCEE-BERT: Accelerating BERT Inference via Patient and Confident Early Exiting. Zhen Zhang, Wei Zhu, Jinfan Zhang, Peng
Wang, Rize Jin, Tae-Sun Chung. Findings of NAACL 2022, ACL Anthology 2022.findings-naacl.25: count the
consecutive exits whose entropy, as a share of log C, is below a threshold; leave where the count reaches the patience.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from earlyexit_kernels.arguments import Check
from earlyexit_kernels.backends import jit, tl
from earlyexit_kernels.criteria.base import PATIENCE, ProbabilityThreshold, entropy_nats
from earlyexit_kernels.criteria.softmax_step import entropy_nats_of


@jit
def patient_confidence_step(z, aux, cols, classes, state, rows, live, layer, depth, p0, p1, p2):
    sure = entropy_nats_of(z, cols, classes) < p0 * tl.log(tl.cast(classes, tl.float32))
    count = tl.where(sure, tl.load(state, mask=live, other=0.0) + 1.0, 0.0)
    tl.debug_barrier()
    tl.store(state, count, mask=live)
    return z, count >= p1


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatientConfidence(ProbabilityThreshold):
    """Leave where `patience` consecutive exits are confident.

    The earliest such layer is `patience`. The exits may differ in their labels. Of the three answers in the authors'
    code this is the default: the logits of the exit at which the row leaves.

    Args:
        threshold: of H(p) / log C, in [0, 1], or a list with one number for each exit before the last. The comparison
            is strict: with 0 no row leaves early.
        patience: >= 1; with 1 this is `Entropy(normalized=True)`.

    Raises:
        ValueError: a threshold is NaN or out of range, or `patience` is not a whole number >= 1.

    Example:
        >>> import torch
        >>> import earlyexit_kernels as ee
        >>> trace = ee.ExitTrace(torch.tensor([[[1.0, 0.0], [4.0, 0.0], [5.0, 0.0], [5.0, 0.0]]]))
        >>> ee.replay(trace, ee.criteria.PatientConfidence(threshold=0.3, patience=2))[1].tolist()
        [3]
    """

    patience: int
    checks: ClassVar[Mapping[str, Check]] = {**ProbabilityThreshold.checks, "patience": PATIENCE}
    name: ClassVar[str] = "patient_confidence"
    triton_step: ClassVar = patient_confidence_step

    def params(self, layer: int) -> list[float]:
        return [*super().params(layer), float(self.patience)]

    def initial_state(self, classes: int) -> tuple[float, ...]:
        return (0.0,)

    @staticmethod
    def rule(
        z: Tensor, aux: Tensor | None, state: Tensor, layer: int, depth: int, params: Sequence[float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        threshold, patience = params
        sure = entropy_nats(z) < threshold * math.log(z.shape[1])
        count = torch.where(sure, state + 1.0, 0.0)
        return z, count[0] >= patience, count
