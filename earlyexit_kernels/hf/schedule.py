"""The training schedule of a model: its method, the current phase, and the progress in it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from earlyexit_kernels.core.full_depth import TraceOptions
from earlyexit_kernels.core.view import is_replica
from earlyexit_kernels.heads import ExitHeads
from earlyexit_kernels.methods import PARTS, Method, PhaseSpec, TrainingStep, check_task, method_of
from earlyexit_kernels.methods.base import LOOP
from earlyexit_kernels.types import ExitTrace

logger = logging.getLogger("earlyexit_kernels")


class Schedule:
    """The training method of a model, its current phase, and what that phase has frozen.

    It refers to no model: replicas of `torch.nn.DataParallel` share the schedule of the model they are made of.

    Attributes:
        method: the training method.
        number: 0-based index of the current phase; None between the phases of a method with several.
    """

    method: Method

    def __init__(self) -> None:
        self.number: int | None = None
        #: Parameters that the phase has frozen. Those frozen by the user are not listed, and stay frozen.
        self._frozen: Sequence[nn.Parameter] = ()
        #: Modules of which the phase trains nothing.
        self._resting: Sequence[nn.Module] = ()
        self._progress: tuple[int | None, float | None] = (None, None)
        self._warned_of_frozen_exits = False

    @property
    def phase(self) -> PhaseSpec | None:
        """The current phase."""
        return None if self.number is None else self.method.phases[self.number]

    def start(self, model: Any, method: Method) -> None:
        """Begin a training method, which is saved with the model, and enter its phase if it has only one.

        Raises:
            ValueError: the method does not fit the heads or the task of the model.
        """
        check_task(method, model.problem_type, model.config.num_labels)
        changes, shape = method.head_changes(model.adapter.shares_layers), model.heads.config
        if method.name == method_of(model.config.method).name:
            changes.pop("form", None)  # chosen at the conversion
        wanted = {k: v for k, v in changes.items() if getattr(shape, k) != v and shape.matters(k)}
        if wanted:
            raise ValueError(
                f"method {method.name!r} trains exits with {wanted}, this model's have "
                f"{ {k: getattr(shape, k) for k in wanted} }; convert the stock model with "
                f"to_early_exit(..., method={method.name!r})"
            )
        self.method = method.at_depth(model.depth)
        model.config.method = self.method.to_dict()
        self.leave(model)

    def leave(self, model: nn.Module) -> None:
        """Leave the current phase: for none, where all parameters may learn, or for the only one of the method."""
        self.enter(model, 0 if len(self.method.phases) == 1 else None)

    def enter(self, model: nn.Module, number: int | None) -> None:
        """Enter a phase: freeze the parameters that it does not train, and disable their dropout.

        Must be called before an optimizer or a Trainer is built. None is between phases, where all parameters may learn
        and there is no loss.

        Raises:
            ValueError: the method has no such phase.
        """
        phases = self.method.phases
        if number is not None and not 0 <= number < len(phases):
            raise ValueError(f"phase: method {self.method.name!r} has phases 0 to {len(phases) - 1}, got {number}")
        self.number = number
        self.set_progress(None, None)
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        trains = PARTS if number is None else phases[number].trains
        resting = {p for name, p in model.named_parameters() if part_of(model, name) not in trains}
        self._frozen = [p for p in resting if p.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        owned = {module: set(module.parameters()) for module in model.modules()}
        self._resting = [module for module, parameters in owned.items() if parameters and parameters <= resting]
        model.train(model.training)

    def rest(self) -> None:
        """Put modules of which the phase trains nothing into eval mode, which disables their dropout."""
        for module in self._resting:
            module.eval()

    def set_progress(self, step: int | None, epoch: float | None) -> None:
        """Set the optimizer steps and epochs done in this phase; `ProgressCallback` calls this."""
        self._progress = (step, epoch)

    def position(self, problem_type: str) -> TrainingStep:
        """Return the position in the current phase."""
        step, epoch = self._progress
        return TrainingStep(problem_type=problem_type, phase=self.number or 0, step=step, epoch=epoch)

    def trace_options(self, problem_type: str) -> TraceOptions:
        """Return what the current phase needs from a full-depth pass."""
        if (phase := self.phase) is None:
            return TraceOptions("halting")
        gating = self.method.gating(self.position(problem_type))
        return TraceOptions("halting", gating, phase.projections, phase.balances)

    def loss(self, heads: ExitHeads, trace: ExitTrace, labels: Tensor | None, problem_type: str) -> Tensor | None:
        """Return the loss of the method, or None if it needs labels and there are none.

        Args:
            heads: those that made the trace, of the model or of a replica.
            trace: of a full-depth pass in train mode.
            labels: of its rows.
            problem_type: of the model.

        Raises:
            ValueError: labels were given between phases.
        """
        phase = self.phase
        if phase is None and labels is not None:
            raise ValueError(
                f"method {self.method.name!r} trains in {len(self.method.phases)} phases and none is entered; {LOOP}"
            )
        if phase is None or (labels is None and phase.needs_labels):
            return None
        learning = [p for p in heads.parameters() if p.requires_grad]
        # a replica has no parameters
        if not learning and not is_replica(heads) and phase.trains != {"backbone"} and not self._warned_of_frozen_exits:
            self._warned_of_frozen_exits = True
            logger.warning(
                "phase %r trains exits, but no parameter of model.heads requires a gradient, so the exits do not "
                "change; with PEFT, pass modules_to_save=['heads'] to its config",
                phase.name,
            )
        # adds 0 times each parameter, since DDP refuses parameters that the loss does not use
        unused = sum(0.0 * p.float().sum() for p in learning)
        if trace.logits.shape[0] == 0:
            return trace.logits.sum() + unused
        return self.method.loss(trace, labels, self.position(problem_type)) + unused


def part_of(model: Any, name: str) -> str:
    """Return the part of `methods.PARTS` that a parameter belongs to, by its name in ``model.named_parameters()``."""
    top, _, rest = name.partition(".")
    return model.heads.part_of(rest) if top == "heads" else top
