"""What a model keeps of its training: the method, the phase it is in, and how far that has come."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from earlyexit_kernels.engine.full_depth import Collect
from earlyexit_kernels.hf.config import default_problem_type
from earlyexit_kernels.objectives import PARTS, Objective, PhaseSpec, TrainingStep, check_task
from earlyexit_kernels.types import ExitTrace

logger = logging.getLogger("earlyexit_kernels")


class PhasedTraining(PreTrainedModel):
    """Base of the model, which brings `backbone` and `heads`."""

    config: Any
    backbone: Any
    heads: Any
    adapter: Any
    objective: Objective
    _phase: int | None = None
    #: Parameters that the phase has frozen; one that the user froze stays so.
    _frozen: Sequence[nn.Parameter] = ()
    #: Modules of which the phase trains nothing.
    _resting: Sequence[nn.Module] = ()
    _warned_of_frozen_exits = False
    _progress: tuple[int | None, float | None] = (None, None)

    @property
    def problem_type(self) -> str:
        """As in transformers, never None."""
        return self.config.problem_type or default_problem_type(self.config.num_labels)

    def set_objective(self, objective: Objective) -> None:
        """Choose the training method; it is saved with the model.

        Raises:
            ValueError: the heads lack what it trains, or it has no meaning for this task.
        """
        check_task(objective, self.problem_type, self.config.num_labels)
        shape, wanted = self.heads.config, objective.head_changes(self.adapter.shares_layers)
        others = {k: v for k, v in wanted.items() if getattr(shape, k) != v and shape.matters(k)}
        if others:
            raise ValueError(
                f"method {objective.name!r} trains exits with {others}, this model's have "
                f"{ {k: getattr(shape, k) for k in others} }; convert the stock model with "
                f"to_early_exit(..., method={objective.name!r})"
            )
        self.objective = objective
        self.config.method = objective.to_dict()
        self.enter_phase(0 if len(objective.phases) == 1 else None)

    @property
    def phase(self) -> PhaseSpec | None:
        """The training phase that the model is in; None before `earlyexit_kernels.phases` has entered one."""
        return None if self._phase is None else self.objective.phases[self._phase]

    def enter_phase(self, phase: int | None) -> None:
        """Make one phase of the method the current one: its parts learn, the others are frozen.

        What is frozen runs without dropout. `earlyexit_kernels.phases` calls this before each Trainer is built.

        Args:
            phase: 0-based; None between phases, where everything may learn and there is no loss.

        Raises:
            ValueError: the method has no such phase.
        """
        specs = self.objective.phases
        if phase is not None and not 0 <= phase < len(specs):
            raise ValueError(f"phase: method {self.objective.name!r} has phases 0 to {len(specs) - 1}, got {phase}")
        self._phase = phase
        self.set_progress(None, None)
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        trains = PARTS if phase is None else specs[phase].trains
        resting = {id(p): p for n, p in self.named_parameters() if self.part_of(n) not in trains}
        self._frozen = [parameter for parameter in resting.values() if parameter.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        owned = {module: {id(p) for p in module.parameters()} for module in self.modules()}
        self._resting = [module for module, own in owned.items() if own and own <= resting.keys()]
        self.train(self.training)

    def set_progress(self, step: int | None, epoch: float | None) -> None:
        """Tell where in the phase training stands, in optimiser steps and epochs done; the phase's callback does."""
        self._progress = (step, epoch)

    def part_of(self, name: str) -> str:
        """The part of the model (one of `objectives.PARTS`) that a parameter belongs to.

        Args:
            name: as in ``named_parameters``.
        """
        top, _, rest = name.partition(".")
        return self.heads.part_of(rest) if top == "heads" else top

    def train(self, mode: bool = True) -> Any:
        """As in torch; what the current phase doesn't train stays in eval mode, so that it doesn't drop out."""
        super().train(mode)
        for module in self._resting if mode else ():
            module.eval()
        return self

    def training_step(self) -> TrainingStep | None:
        """Where training stands; None outside of a phase."""
        if self._phase is None:
            return None
        step, epoch = self._progress
        return TrainingStep(problem_type=self.problem_type, phase=self._phase, step=step, epoch=epoch)

    def training_collect(self) -> Collect:
        """What the current phase wants of a full-depth pass."""
        spec, step = self.phase, self.training_step()
        if spec is None or step is None:
            return Collect(needs="halting")
        return Collect("halting", self.objective.gating(step), spec.projections, spec.balances)

    def training_loss(self, trace: ExitTrace, labels: Tensor | None) -> Tensor | None:
        """The method's loss, or None where it needs labels and there are none.

        Raises:
            ValueError: labels came, but the method trains in phases and none is entered.
        """
        spec, step = self.phase, self.training_step()
        if spec is None or step is None:
            if labels is None:
                return None
            raise ValueError(
                f"method {self.objective.name!r} trains in {len(self.objective.phases)} phases and none is entered; "
                "train with `for phase in earlyexit_kernels.phases(model): Trainer(model, args=phase.args(base), "
                "callbacks=phase.callbacks(), ...).train()`"
            )
        if labels is None and spec.needs_labels:
            return None
        learning = [p for p in self.heads.parameters() if p.requires_grad]
        if not learning and spec.trains != {"backbone"} and not self._warned_of_frozen_exits:
            self._warned_of_frozen_exits = True
            logger.warning(
                "phase %r trains exits, but no parameter of model.heads requires a gradient, so the exits stay as they "
                "are; with PEFT, pass modules_to_save=['heads'] to its config",
                spec.name,
            )
        # what the loss leaves out would be an unused parameter, which DDP refuses
        unread = sum(0.0 * p.float().sum() for p in learning)
        if trace.logits.shape[0] == 0:
            return trace.logits.sum() + unread
        return self.objective.loss(trace, labels, step) + unread
