"""Ensemble of internal classifiers: train exits to be accurate and to differ from each other.

Early Exiting with Ensemble Internal Classifiers. Tianxiang Sun et al. 2021, arXiv 2105.13792, eq. 14:
L = sum_i alpha_i (CE(p_i, y) - lambda min_{j<i} CE(p_i, p_j)), with alpha_i = 1, no minimum for i = 1, and
CE(p_i, p_j) = -sum_k p_j(k) log p_i(k).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from earlyexit_kernels.arguments import Check, choice, flag, number, optional
from earlyexit_kernels.methods.base import (
    Method,
    PhaseSpec,
    TrainingStep,
    at_least_float32,
    exit_losses,
    labelled,
    layer_numbers,
    row_mean,
)
from earlyexit_kernels.types import CLASSIFICATION, ExitTrace


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ensemble(Method):
    """Sum of the exits' cross entropies, minus each exit's distance to the nearest previous exit.

    For single-label classification: the paper defines no distance for regression. Three epochs at 2e-5; the settings of
    the paper, including its grid of lambda, could not be verified.

    Args:
        diversity: lambda in [0, 1].
        weights: alpha_i of the exits: ``"equal"`` is 1, ``"depth"`` is i, the weights of `Joint` before it divides by
            their sum.
        min_over: ``"sample"`` takes the minimum for each row; ``"batch"`` compares means over the batch (of all
            processes), as a third-party implementation does. The formula does not define it.
        detach_target: no gradient into p_j of the previous exit.
        skip_last: no distance for the last exit.
        cap: maximum of each distance, or None. Without it the loss has no lower bound.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> import earlyexit_kernels as ee
        >>> ee.methods.Ensemble(diversity=0.2).rule
        'voting'
    """

    diversity: float = 0.1
    weights: str = "equal"
    min_over: str = "sample"
    detach_target: bool = False
    skip_last: bool = False
    cap: float | None = None
    name: ClassVar[str] = "ensemble"
    tasks: ClassVar[frozenset[str]] = CLASSIFICATION
    rule: ClassVar[str] = "voting"
    checks: ClassVar[Mapping[str, Check]] = {
        "diversity": number(low=0.0, high=1.0),
        "weights": choice("equal", "depth"),
        "min_over": choice("sample", "batch"),
        "detach_target": flag,
        "skip_last": flag,
        "cap": optional(number(low=0.0, inside=True)),
    }

    @property
    def phases(self) -> tuple[PhaseSpec, ...]:
        return (PhaseSpec(name="ensemble"),)

    def loss(self, trace: ExitTrace, labels: Tensor | None, step: TrainingStep) -> Tensor:
        rows = labelled(labels, step.problem_type, trace.logits)
        losses = exit_losses(trace.logits, labels, step.problem_type)
        alpha = layer_numbers(losses) if self.weights == "depth" else torch.ones_like(layer_numbers(losses))
        right = row_mean((losses * alpha).sum(dim=1), rows)
        log_p = at_least_float32(trace.logits).log_softmax(dim=-1)
        target = log_p.exp().detach() if self.detach_target else log_p.exp()
        last = trace.depth - 1 if self.skip_last else trace.depth
        apart = [alpha[i] * self._nearest(cross_entropies(log_p[:, i], target[:, :i]), rows) for i in range(1, last)]
        return right - self.diversity * torch.stack(apart).sum() if apart else right

    def _nearest(self, distances: Tensor, rows: Tensor) -> Tensor:
        """Return the minimum of the distances ``[N, J]`` to previous exits, as a mean over the rows that count."""
        if self.min_over == "sample":
            return row_mean(self._capped(distances.min(dim=1).values), rows)
        return self._capped(row_mean(distances, rows, everywhere=True).min())

    def _capped(self, x: Tensor) -> Tensor:
        return x if self.cap is None else x.clamp(max=self.cap)


def cross_entropies(log_p: Tensor, targets: Tensor) -> Tensor:
    """Return CE(p, t_j) ``[N, J]`` for log p ``[N, C]`` and soft targets ``[N, J, C]``."""
    return -(targets * log_p[:, None]).sum(dim=-1)
