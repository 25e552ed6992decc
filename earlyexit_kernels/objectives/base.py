"""What a training objective is, and the task loss every one of them is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch.nn.functional as F
from torch import Tensor

from earlyexit_kernels.types import ExitTrace

#: ``(trace, labels, problem_type) -> scalar loss``
Objective: TypeAlias = Callable[[ExitTrace, Tensor, str], Tensor]


def _squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    labels = labels.to(logits.dtype).view(logits.shape[0], -1)
    return (logits - labels).square().mean(dim=-1)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels.view(-1), reduction="none")


def _binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none").mean(dim=-1)


#: Label of a row without one, as in torch's cross entropy.
IGNORED = -100

TASK_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "regression": _squared_error,
    "single_label_classification": _cross_entropy,
    "multi_label_classification": _binary_cross_entropy,
}


def mean_task_loss(logits: Tensor, labels: Tensor, problem_type: str) -> Tensor:
    """Mean of `task_loss` over the rows that have a label: as in stock models, class -100 means none."""
    losses = task_loss(logits, labels, problem_type)
    if problem_type != "single_label_classification":
        return losses.mean()
    return losses.sum() / (labels != IGNORED).sum().clamp(min=1).to(losses)


def task_loss(logits: Tensor, labels: Tensor, problem_type: str) -> Tensor:
    """Loss of each row ``[N]`` of one exit's logits ``[N, C]``: MSE, cross entropy or binary cross entropy.

    Args:
        logits: ``[N, C]``.
        labels: ``[N]``, or ``[N, C]`` where the task has several.
        problem_type: as in transformers.

    Raises:
        ValueError: an unknown problem type.
    """
    if problem_type not in TASK_LOSSES:
        raise ValueError(f"problem_type: expected one of {sorted(TASK_LOSSES)}, got {problem_type!r}")
    return TASK_LOSSES[problem_type](logits.float(), labels.to(logits.device))
