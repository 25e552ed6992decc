"""DeeBERT: train the encoder and the last exit first, then the early exits.

DeeBERT: Dynamic Early Exiting for Accelerating BERT Inference. Ji Xin, Raphael Tang, Jaejun Lee, Yaoliang Yu, Jimmy
Lin. ACL 2020, arXiv 2004.12993: L_L for all parts but the early exits, then sum_{l<L} L_l for the early exits only.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from torch import Tensor

from earlyexit_kernels.methods.base import (
    BACKBONE,
    ENCODER,
    Method,
    PhaseSpec,
    TrainingStep,
    exit_losses,
    labelled,
    row_mean,
)
from earlyexit_kernels.types import ExitTrace


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deebert(Method):
    """Two phases of three epochs each at 2e-5 (ten for RoBERTa in the paper): ``"backbone"``, then ``"exits"``.

    For any task. Each exit has its own dense module, initialised as a copy of the pooler; that of an early exit belongs
    to the part "early_exits", not to "dense".

    Differences from the public code: the last exit is the ordinary classifier; the code adds another exit there, which
    is never trained and gives the answer.

    Example:
        >>> import earlyexit_kernels as ee
        >>> [phase.name for phase in ee.methods.Deebert().phases]
        ['backbone', 'exits']
    """

    name: ClassVar[str] = "deebert"
    rule: ClassVar[str] = "entropy"

    @property
    def phases(self) -> tuple[PhaseSpec, ...]:
        return (
            PhaseSpec(name="backbone", trains=ENCODER),
            PhaseSpec(name="exits", trains=frozenset({"early_exits"})),
        )

    def head_changes(self, shares_layers: bool) -> dict[str, Any]:
        return {"exit_dense": "own"}

    def loss(self, trace: ExitTrace, labels: Tensor | None, step: TrainingStep) -> Tensor:
        rows = labelled(labels, step.problem_type, trace.logits)
        logits = trace.logits[:, -1:] if step.phase == BACKBONE else trace.logits[:, :-1]
        return row_mean(exit_losses(logits, labels, step.problem_type).sum(dim=1), rows)
