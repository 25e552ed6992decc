"""The training state of a model: its method, the current phase, and the progress in it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from earlyexit_kernels.engine.full_depth import TraceOptions
from earlyexit_kernels.engine.view import is_replica
from earlyexit_kernels.heads import ExitHeads, HeadConfig
from earlyexit_kernels.objectives import PARTS, Objective, PhaseSpec, TrainingStep, check_task, objective_of
from earlyexit_kernels.types import ExitTrace

logger = logging.getLogger("earlyexit_kernels")


class PhaseState:
    """The training method of one model, its current phase, and the parameters that the phase has frozen.

    Attributes:
        objective: the method.
        number: 0-based index of the current phase; None between the phases of a method with several.
    """

    objective: Objective

    def __init__(self) -> None:
        self.number: int | None = None
        #: Frozen by the phase; parameters that the user froze are not listed, and stay frozen.
        self._frozen: Sequence[nn.Parameter] = ()
        #: Modules of which the phase trains nothing.
        self._resting: Sequence[nn.Module] = ()
        self._progress: tuple[int | None, float | None] = (None, None)
        self._warned_of_frozen_exits = False

    @property
    def spec(self) -> PhaseSpec | None:
        """The current phase."""
        return None if self.number is None else self.objective.phases[self.number]

    def set_objective(self, model: Any, objective: Objective) -> None:
        """Change the training method, and enter its phase if it has only one.

        Args:
            model: the early-exit model of this state.
            objective: the method.

        Raises:
            ValueError: it does not fit the heads or the task of the model.
        """
        check_task(objective, model.problem_type, model.config.num_labels)
        changes = objective.head_changes(model.adapter.shares_layers)
        # the form of a model's own method was chosen at its conversion
        if objective.name == objective_of(model.config.method).name:
            changes.pop("form", None)
        _check_heads(objective, model.heads.config, changes)
        self.objective = objective.at_depth(model.depth)
        self.enter(model, 0 if len(objective.phases) == 1 else None)

    def enter(self, model: nn.Module, number: int | None) -> None:
        """Enter a phase of `model`: freeze the parameters that it does not train, and disable their dropout.

        Must be called before an optimizer or a Trainer is built.

        Args:
            model: the early-exit model of this state.
            number: 0-based; None: between phases, where all parameters may learn and there is no loss.

        Raises:
            ValueError: the method has no such phase.
        """
        specs = self.objective.phases
        if number is not None and not 0 <= number < len(specs):
            raise ValueError(f"phase: method {self.objective.name!r} has phases 0 to {len(specs) - 1}, got {number}")
        self.number = number
        self.set_progress(None, None)
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        trains = PARTS if number is None else specs[number].trains
        resting = {id(p): p for name, p in model.named_parameters() if part_of(model, name) not in trains}
        self._frozen = [parameter for parameter in resting.values() if parameter.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        owned = {module: {id(p) for p in module.parameters()} for module in model.modules()}
        self._resting = [module for module, own in owned.items() if own and own <= resting.keys()]
        model.train(model.training)

    def rest(self) -> None:
        """Put modules of which the phase trains nothing into eval mode, which disables their dropout."""
        for module in self._resting:
            module.eval()

    def set_progress(self, step: int | None, epoch: float | None) -> None:
        """Set the optimizer steps and epochs done in this phase; `ProgressCallback` calls this."""
        self._progress = (step, epoch)

    def step(self, problem_type: str) -> TrainingStep | None:
        """Return the position in the training; None between phases.

        Args:
            problem_type: of the model.
        """
        if self.number is None:
            return None
        step, epoch = self._progress
        return TrainingStep(problem_type=problem_type, phase=self.number, step=step, epoch=epoch)

    def trace_options(self, problem_type: str) -> TraceOptions:
        """Return what the current phase needs from a full-depth pass.

        Args:
            problem_type: of the model.
        """
        spec, step = self.spec, self.step(problem_type)
        if spec is None or step is None:
            return TraceOptions(needs="halting")
        return TraceOptions("halting", self.objective.gating(step), spec.projections, spec.balances)

    def loss(self, heads: ExitHeads, trace: ExitTrace, labels: Tensor | None, problem_type: str) -> Tensor | None:
        """Return the loss of the method, or None if it needs labels and there are none.

        Args:
            heads: of the model.
            trace: of a full-depth pass in train mode.
            labels: of its rows.
            problem_type: of the model.

        Raises:
            ValueError: labels were given between phases.
        """
        spec, step = self.spec, self.step(problem_type)
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
        learning = [p for p in heads.parameters() if p.requires_grad]
        # a replica has no parameters
        if not learning and not is_replica(heads) and spec.trains != {"backbone"} and not self._warned_of_frozen_exits:
            self._warned_of_frozen_exits = True
            logger.warning(
                "phase %r trains exits, but no parameter of model.heads requires a gradient, so the exits do not "
                "change; with PEFT, pass modules_to_save=['heads'] to its config",
                spec.name,
            )
        # adds 0 times each parameter, since DDP refuses parameters that the loss does not use
        unused = sum(0.0 * p.float().sum() for p in learning)
        if trace.logits.shape[0] == 0:
            return trace.logits.sum() + unused
        return self.objective.loss(trace, labels, step) + unused


def _check_heads(objective: Objective, shape: HeadConfig, changes: dict[str, Any]) -> None:
    others = {k: v for k, v in changes.items() if getattr(shape, k) != v and shape.matters(k)}
    if others:
        raise ValueError(
            f"method {objective.name!r} trains exits with {others}, this model's have "
            f"{ {k: getattr(shape, k) for k in others} }; convert the stock model with "
            f"to_early_exit(..., method={objective.name!r})"
        )


def part_of(model: Any, name: str) -> str:
    """Return the part of an early-exit model, one of `objectives.PARTS`, that a parameter belongs to.

    Args:
        model: the early-exit model.
        name: as in ``named_parameters``.
    """
    top, _, rest = name.partition(".")
    return model.heads.part_of(rest) if top == "heads" else top
