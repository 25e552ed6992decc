"""FastBERT: distil the last exit into the early exits, without labels.

FastBERT: a Self-distilling BERT with Adaptive Inference Time. Weijie Liu et al. ACL 2020, arXiv 2004.02178: L_L
for the encoder and the last exit, the teacher; then sum_{l<L} KL of teacher and student l, for the students only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from earlyexit_kernels.arguments import Check, choice
from earlyexit_kernels.methods.base import (
    BACKBONE,
    ENCODER,
    Method,
    PhaseSpec,
    TrainingStep,
    at_least_float32,
    exit_losses,
    labelled,
    row_mean,
)
from earlyexit_kernels.types import CLASSIFICATION, ExitTrace


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fastbert(Method):
    """Two phases: ``"backbone"`` (3 epochs at 2e-5), then ``"exits"`` (5 epochs at 2e-4), which needs no labels.

    For single-label classification. Exits are attention heads of width 128. In the second phase, rows of class -100 are
    excluded if labels are given; without labels every row counts.

    Args:
        kl: ``"teacher_student"`` is KL(teacher || student), as in the public code; ``"student_teacher"`` is the
            reverse, as the paper's eq. 6 can be read. The temperature is 1; the teacher has no gradient.

    Raises:
        ValueError: an unknown direction.

    Example:
        >>> import earlyexit_kernels as ee
        >>> ee.methods.Fastbert().phases[1].needs_labels
        False
    """

    kl: str = "teacher_student"
    name: ClassVar[str] = "fastbert"
    tasks: ClassVar[frozenset[str]] = CLASSIFICATION
    rule: ClassVar[str] = "entropy"
    checks: ClassVar[Mapping[str, Check]] = {"kl": choice("teacher_student", "student_teacher")}

    @property
    def phases(self) -> tuple[PhaseSpec, ...]:
        return (
            PhaseSpec(name="backbone", trains=ENCODER),
            PhaseSpec(name="exits", trains=frozenset({"early_exits"}), epochs=5.0, lr=2e-4, needs_labels=False),
        )

    def head_changes(self, shares_layers: bool) -> dict[str, Any]:
        return {"form": "attention", "width": 128, "attention_heads": 2}

    def loss(self, trace: ExitTrace, labels: Tensor | None, step: TrainingStep) -> Tensor:
        rows = labelled(labels, step.problem_type, trace.logits)
        if step.phase == BACKBONE:
            return row_mean(exit_losses(trace.logits[:, -1:], labels, step.problem_type)[:, 0], rows)
        student = at_least_float32(trace.logits[:, :-1]).log_softmax(dim=-1)
        teacher = at_least_float32(trace.logits[:, -1:].detach()).log_softmax(dim=-1)
        p, other = (teacher, student) if self.kl == "teacher_student" else (student, teacher)
        return row_mean((p.exp() * (p - other)).sum(dim=(1, 2)), rows)
