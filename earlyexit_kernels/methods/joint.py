"""Joint training of all exits, weighted by depth.

BERT Loses Patience: Fast and Robust Inference with Early Exit. Wangchunshu Zhou et al. NeurIPS 2020, arXiv 2006.04152,
eq. 6 (after Kaya et al. 2019, arXiv 1810.07052): L = sum_j j L_j / sum_j j.

Towards Efficient NLP: A Standard Evaluation and A Strong Baseline (ElasticBERT). Xiangyang Liu et al. NAACL 2022, arXiv
2110.07038: gradient equilibrium (after Li et al. 2019, arXiv 1908.06281): a layer's gradient is the average over exits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from earlyexit_kernels.arguments import Check, flag
from earlyexit_kernels.methods.base import (
    Method,
    PhaseSpec,
    TrainingStep,
    exit_losses,
    labelled,
    layer_numbers,
    row_mean,
)
from earlyexit_kernels.types import ExitTrace


@dataclasses.dataclass(frozen=True, kw_only=True)
class Joint(Method):
    """Average of the exits' mean losses, exit j with weight j / (1 + ... + L), in one phase that trains all parts.

    For any task. Five epochs at 2e-5, as in the scripts of the paper.

    Args:
        equilibrium: use ElasticBERT's gradient equilibrium: a layer receives the average of the gradients of the exits
            at and above it instead of their sum. The loss and the gradients of the exits themselves do not change.

    Raises:
        ValueError: `equilibrium` is not True or False.

    Example:
        >>> import earlyexit_kernels as ee
        >>> ee.methods.Joint(equilibrium=True).phases[0].balances
        True
    """

    equilibrium: bool = False
    name: ClassVar[str] = "joint"
    rule: ClassVar[str] = "patience"
    checks: ClassVar[Mapping[str, Check]] = {"equilibrium": flag}

    @property
    def phases(self) -> tuple[PhaseSpec, ...]:
        return (PhaseSpec(name="joint", epochs=5.0, balances=self.equilibrium),)

    def loss(self, trace: ExitTrace, labels: Tensor | None, step: TrainingStep) -> Tensor:
        losses = exit_losses(trace.logits, labels, step.problem_type)
        weights = layer_numbers(losses)
        rows = labelled(labels, step.problem_type, trace.logits)
        return row_mean(losses @ weights / weights.sum(), rows)
