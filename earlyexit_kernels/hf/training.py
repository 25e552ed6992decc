"""Training a method phase by phase, each phase one run of transformers' Trainer."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from earlyexit_kernels.hf.model import EarlyExitForSequenceClassification, early_exit_model_in
from earlyexit_kernels.objectives import Objective, PhaseSpec, objective_of
from earlyexit_kernels.objectives.arguments import number, optional

#: What a training argument that is a number may be, by its name.
NUMBERS = {
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_epsilon", "num_train_epochs"), number(low=0.0)),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), number(low=0.0, high=1.0)),
}


class ProgressCallback(TrainerCallback):
    """Tells the model where training stands, before every step; methods that change on the way read it."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Pass the step and the epoch on, through whatever wraps the model."""
        inner = early_exit_model_in(model)
        if inner is None:
            raise TypeError(f"ProgressCallback: expected an early-exit model, got {type(model).__name__}")
        inner.set_progress(state.global_step, state.epoch)


@dataclass(frozen=True)
class Phase:
    """One run of the Trainer, for the model that `phases` was given.

    Attributes:
        number: from 1.
        spec: what learns, and the paper's epochs and learning rate.
    """

    number: int
    spec: PhaseSpec
    model: EarlyExitForSequenceClassification

    @property
    def name(self) -> str:
        """The phase's name, ``"backbone"`` or ``"exits"`` for instance."""
        return self.spec.name

    def args(self, base: TrainingArguments, **changes: Any) -> TrainingArguments:
        """The arguments of this phase's Trainer: `base` with a checkpoint folder of its own below ``output_dir``.

        Args:
            base: left as it is.
            changes: fields to set, such as ``num_train_epochs=phase.spec.epochs``.

        Raises:
            ValueError: TrainingArguments has no such field, or a number is negative or not finite.
        """
        unknown = [name for name in changes if not hasattr(base, name)]
        if unknown:
            raise ValueError(f"phase.args: expected fields of TrainingArguments, got {unknown}")
        args = copy.copy(base)
        folder = Path(str(base.output_dir)) / f"phase-{self.number}-{self.name}"
        for name, value in {"output_dir": str(folder), **changes}.items():
            setattr(args, name, value)
        _check_numbers("phase.args", args)
        return args

    def callbacks(self) -> list[TrainerCallback]:
        """Callbacks for the Trainer: methods that alternate, or go from soft to hard gates, count steps with them."""
        return [ProgressCallback()]

    def optimizer(
        self, args: TrainingArguments, *, head_lr: float | None = None, halting_lr: float | None = None
    ) -> torch.optim.Optimizer:
        """AdamW over what this phase trains, for ``Trainer(optimizers=(phase.optimizer(args), None))``.

        Biases and norms don't decay, as in the Trainer's own; nor do halting heads where the paper says so.

        Args:
            args: `learning_rate` (of the encoder), `weight_decay` and Adam's numbers.
            head_lr: of everything but the encoder; fresh exits learn slowly at an encoder's rate. Default: the same.
            halting_lr: of halting heads. Default: `head_lr`.

        Raises:
            ValueError: a rate, or another number, is negative or not finite.
        """
        _check_numbers("phase.optimizer", args)
        for name, rate in {"head_lr": head_lr, "halting_lr": halting_lr}.items():
            optional(number(low=0.0))(f"phase.optimizer({name}=...)", rate)
        head_lr = args.learning_rate if head_lr is None else head_lr
        rates = {"backbone": args.learning_rate, "halting": head_lr if halting_lr is None else halting_lr}
        halting_decays = self.model.objective.halting_weight_decay
        groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            part = self.model.part_of(name)
            decays = parameter.dim() > 1 and (part != "halting" or halting_decays)
            key = (rates.get(part, head_lr), args.weight_decay if decays else 0.0)
            groups.setdefault(key, []).append(parameter)
        listed = [{"params": found, "lr": lr, "weight_decay": decay} for (lr, decay), found in groups.items()]
        betas = (args.adam_beta1, args.adam_beta2)
        return torch.optim.AdamW(listed, lr=args.learning_rate, betas=betas, eps=args.adam_epsilon, fused=True)


def _check_numbers(where: str, args: TrainingArguments) -> None:
    """Refuse rates and other numbers with which training can only spoil the weights."""
    for name, check in NUMBERS.items():
        check(f"{where}({name}=...)", getattr(args, name))


def phases(model: EarlyExitForSequenceClassification, method: str | Objective | None = None) -> Iterator[Phase]:
    """Go through the phases of a training method; while one is the current, its parts learn and the rest is frozen.

    Build a Trainer for each, inside of the loop, since `requires_grad` must be set before it is built::

        for phase in ee.phases(model):
            Trainer(model, args=phase.args(base), callbacks=phase.callbacks(), train_dataset=train_set).train()

    To go on in the middle of a phase, ``continue`` over the finished ones and call
    ``train(resume_from_checkpoint=True)``: a phase's checkpoints hold the whole model.

    Args:
        model: the early-exit model.
        method: default: the one it was converted with.

    Raises:
        TypeError: no early-exit model.
        ValueError: the heads lack what the method trains, or it has no meaning for the task.
    """
    if not isinstance(model, EarlyExitForSequenceClassification):
        raise TypeError(
            f"phases: expected an early-exit model, got {type(model).__name__}; make one with to_early_exit(model, "
            "method=...)"
        )
    if method is not None:
        model.set_objective(objective_of(method))
    specs = model.objective.phases
    try:
        for number, spec in enumerate(specs, start=1):
            model.enter_phase(number - 1)
            yield Phase(number, spec, model)
    finally:
        model.enter_phase(0 if len(specs) == 1 else None)
