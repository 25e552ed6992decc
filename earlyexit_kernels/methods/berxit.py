"""BERxiT: train the last exit and all exits alternately, and a head that predicts the uncertainty of an exit.

BERxiT: Early Exiting for BERT with Better Fine-Tuning and Extension to Regression. Ji Xin, Raphael Tang, Yaoliang Yu,
Jimmy Lin. EACL 2021, 2021.eacl-main.8; its exits are those of DeeBERT, arXiv 2004.12993. Even steps minimise L_L, odd
ones sum_l L_l; learning to exit (LTE) fits an uncertainty u_l to whether, or how far, exit l is wrong.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from earlyexit_kernels.arguments import Check, choice, flag, number
from earlyexit_kernels.methods.base import (
    BACKBONE,
    ENCODER,
    LOOP,
    Method,
    PhaseSpec,
    TrainingStep,
    at_least_float32,
    columns,
    exit_losses,
    labelled,
    layer_numbers,
    needed,
    row_mean,
)
from earlyexit_kernels.types import ExitTrace


@dataclasses.dataclass(frozen=True, kw_only=True)
class Berxit(Method):
    """Task losses by a strategy, plus the squared error of the uncertainty, averaged over layers and rows.

    For single-label classification and regression; the uncertainty has no target for several labels per row. Three
    epochs at 2e-5, as in the paper. The target of the uncertainty is 1 - 1[argmax z_l = y], or tanh |z_l - y| for
    regression (several outputs: their mean), without a gradient; u_l itself has a gradient into all parts that the
    phase trains.

    Args:
        strategy: ``"alternating"``: L_L at even optimiser steps (from 0), all exits at odd ones; ``"two_stage"``: as
            DeeBERT, with the uncertainty trained beside the early exits; ``"joint"``: sum_l L_l at every step;
            ``"weight_linear"``: sum_l l L_l / sum_l l at every step, the loss of `Joint`.
        odd_includes_last: odd steps sum over l <= L, as in the paper; False: l < L, as in the LTE variant of its code.
        learned_weight: weight of the uncertainty's loss, at least 0.

    Raises:
        ValueError: an argument out of range.

    Differences from the public code: u_L reads the exit whose answer it is fitted to, not an untrained one.

    Example:
        >>> import earlyexit_kernels as ee
        >>> ee.methods.Berxit(strategy="joint").phases[0].name
        'joint'
    """

    strategy: str = "alternating"
    odd_includes_last: bool = True
    learned_weight: float = 1.0
    name: ClassVar[str] = "berxit"
    tasks: ClassVar[frozenset[str]] = frozenset({"single_label_classification", "regression"})
    rule: ClassVar[str] = "learned"
    checks: ClassVar[Mapping[str, Check]] = {
        "strategy": choice("alternating", "two_stage", "joint", "weight_linear"),
        "odd_includes_last": flag,
        "learned_weight": number(low=0.0),
    }

    @property
    def phases(self) -> tuple[PhaseSpec, ...]:
        if self.strategy == "two_stage":
            return (
                PhaseSpec(name="backbone", trains=ENCODER),
                PhaseSpec(name="exits", trains=frozenset({"early_exits", "uncertainty"})),
            )
        return (PhaseSpec(name=self.strategy),)

    def head_changes(self, shares_layers: bool) -> dict[str, Any]:
        return {"exit_dense": "own", "uncertainty": True}

    def loss(self, trace: ExitTrace, labels: Tensor | None, step: TrainingStep) -> Tensor:
        exits, learns = self._exits(trace.depth, step)
        losses = exit_losses(trace.logits[:, exits], labels, step.problem_type)
        if self.strategy == "weight_linear":
            losses = losses * layer_numbers(losses) / layer_numbers(losses).sum()
        losses = losses.sum(dim=1)
        if learns:
            u = self.aux(trace, "uncertainty").sigmoid()
            error = (u - wrongness(trace.logits, needed(labels), step.problem_type)).square().mean(dim=1)
            losses = losses + self.learned_weight * error
        return row_mean(losses, labelled(labels, step.problem_type, trace.logits))

    def _exits(self, depth: int, step: TrainingStep) -> tuple[slice, bool]:
        """Return the exits whose losses count at this step, and whether the uncertainty learns."""
        early, last, every = slice(0, depth - 1), slice(depth - 1, depth), slice(0, depth)
        if self.strategy == "two_stage":
            return (last, False) if step.phase == BACKBONE else (early, True)
        if self.strategy in ("joint", "weight_linear"):
            return every, True
        if step.step is None:
            raise ValueError(
                "Berxit(strategy='alternating') needs the number of optimiser steps done, got None; "
                f"{LOOP}, which counts them, or choose another strategy"
            )
        odd = every if self.odd_includes_last else early
        return (last if step.step % 2 == 0 else odd), True


def wrongness(logits: Tensor, labels: Tensor, problem_type: str) -> Tensor:
    """Return the target of the uncertainty, ``[N, L]`` for logits ``[N, L, C]``, without a gradient."""
    z, y = at_least_float32(logits.detach()), columns(labels.to(logits.device))
    if problem_type == "regression":
        return (z - y[:, None].to(z)).abs().mean(dim=-1).tanh()
    return (z.argmax(dim=-1) != y).to(z)
