"""Training in phases, each of which is one run of transformers' Trainer."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from earlyexit_kernels.arguments import number, optional
from earlyexit_kernels.hf.model import EarlyExitForSequenceClassification, early_exit_model_in
from earlyexit_kernels.hf.schedule import part_of
from earlyexit_kernels.methods import Method, PhaseSpec, method_of

#: Numeric training argument -> its check.
NUMBERS = {
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_epsilon", "num_train_epochs"), number(low=0.0)),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), number(low=0.0, high=1.0)),
}


class ProgressCallback(TrainerCallback):
    """Tells the model, which may be wrapped, the step and the epoch, for methods that change during training."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Called by the Trainer before each step."""
        inner = early_exit_model_in(model)
        if inner is None:
            raise TypeError(f"ProgressCallback: expected an early-exit model, got {type(model).__name__}")
        inner.schedule.set_progress(state.global_step, state.epoch)


@dataclass(frozen=True)
class Phase:
    """One training phase of a model, created by `phases`.

    Attributes:
        number: counted from 1.
        spec: the parts of the model that learn, and the epochs and learning rate of the paper.
        model: the early-exit model.

    Example:

        >>> import earlyexit_kernels as ee
        >>> from transformers import BertConfig
        >>> sizes = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
        >>> config = ee.EarlyExitConfig(backbone_config=BertConfig(**sizes))
        >>> model = ee.EarlyExitForSequenceClassification(config)
        >>> (phase,) = ee.phases(model)  # method "joint" has one phase
        >>> phase.number, phase.name, phase.spec.epochs
        (1, 'joint', 5.0)
    """

    number: int
    spec: PhaseSpec
    model: EarlyExitForSequenceClassification

    @property
    def name(self) -> str:
        """The name of the phase, for example ``"backbone"`` or ``"exits"``."""
        return self.spec.name

    def args(self, base: TrainingArguments, **changes: Any) -> TrainingArguments:
        """Return the arguments of this phase's Trainer: `base` with a checkpoint folder of its own in ``output_dir``.

        Args:
            base: not changed.
            changes: fields to set, such as ``num_train_epochs=phase.spec.epochs``.

        Raises:
            ValueError: TrainingArguments has no such field, or a number is negative or not finite.
        """
        unknown = [name for name in changes if not hasattr(base, name)]
        if unknown:
            raise ValueError(f"phase.args: expected fields of TrainingArguments, got {unknown}")
        args = copy.copy(base)
        args.output_dir = str(Path(str(base.output_dir)) / f"phase-{self.number}-{self.name}")
        for name, value in changes.items():
            setattr(args, name, value)
        _check_numbers("phase.args", args)
        return args

    def callbacks(self) -> list[TrainerCallback]:
        """Return the callbacks of the Trainer, which methods that change during training require."""
        return [ProgressCallback()]

    def optimizer(
        self,
        args: TrainingArguments,
        *,
        head_lr: float | None = None,
        halting_lr: float | None = None,
        gate_lr: float | None = None,
    ) -> torch.optim.Optimizer:
        """Return AdamW for the parameters of this phase, for ``Trainer(optimizers=(phase.optimizer(args), None))``.

        Biases and norms have no weight decay, as in the Trainer's default optimizer; nor have halting heads if the
        paper says so.

        Args:
            args: `learning_rate` (of the encoder), `weight_decay` and the settings of Adam.
            head_lr: learning rate of exits and of all other parameters; new exits learn slowly at the rate of an
                encoder. Default: `learning_rate`.
            halting_lr: learning rate of halting heads. Default: `head_lr`.
            gate_lr: learning rate of skip gates. Default: `learning_rate`, as in SmartBERT's paper; at a higher one
                gates may close before the encoder has learnt the task.

        Raises:
            ValueError: a rate, or another number, is negative or not finite.
        """
        _check_numbers("phase.optimizer", args)
        for name, rate in {"head_lr": head_lr, "halting_lr": halting_lr, "gate_lr": gate_lr}.items():
            optional(number(low=0.0))(f"phase.optimizer({name}=...)", rate)
        head_lr = args.learning_rate if head_lr is None else head_lr
        rates = {
            "backbone": args.learning_rate,
            "halting": head_lr if halting_lr is None else halting_lr,
            "gates": args.learning_rate if gate_lr is None else gate_lr,
        }
        groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                part = part_of(self.model, name)
                decays = parameter.dim() > 1 and (part != "halting" or self.model.method.halting_weight_decay)
                key = (rates.get(part, head_lr), args.weight_decay if decays else 0.0)
                groups.setdefault(key, []).append(parameter)
        listed = [{"params": found, "lr": lr, "weight_decay": decay} for (lr, decay), found in groups.items()]
        betas = (args.adam_beta1, args.adam_beta2)
        return torch.optim.AdamW(listed, lr=args.learning_rate, betas=betas, eps=args.adam_epsilon, fused=True)


def _check_numbers(where: str, args: TrainingArguments) -> None:
    """Refuse training arguments that are negative or not finite."""
    for name, check in NUMBERS.items():
        check(f"{where}({name}=...)", getattr(args, name))


def phases(model: EarlyExitForSequenceClassification, method: str | Method | None = None) -> Iterator[Phase]:
    """Iterate over the phases of a training method; only the parts of the current phase learn, the others are frozen.

    Build the Trainer of each phase inside the loop, after `requires_grad` has been set::

        for phase in ee.phases(model):
            Trainer(model, args=phase.args(base), callbacks=phase.callbacks(), train_dataset=train_set).train()

    To resume in the middle of a phase, ``continue`` over the finished ones and call
    ``train(resume_from_checkpoint=True)``: the checkpoints of a phase hold the whole model.

    Args:
        model: the early-exit model.
        method: a name or one of `earlyexit_kernels.methods`, saved with the model. Default: that of its conversion.

    Yields:
        The phases; each is the current one of the model until the next.

    Raises:
        TypeError: not an early-exit model.
        ValueError: the method does not fit the heads or the task.

    Example:

        >>> import earlyexit_kernels as ee
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
        >>> model = ee.to_early_exit(BertForSequenceClassification(BertConfig(**sizes)), method="deebert")
        >>> for phase in ee.phases(model):
        ...     print(phase.number, phase.name, next(model.backbone.parameters()).requires_grad)
        1 backbone True
        2 exits False
    """
    if not isinstance(model, EarlyExitForSequenceClassification):
        raise TypeError(
            f"phases: expected an early-exit model, got {type(model).__name__}; make one with to_early_exit(model, "
            "method=...)"
        )
    schedule = model.schedule
    if method is not None:
        schedule.start(model, method_of(method))
    try:
        for number, spec in enumerate(schedule.method.phases, start=1):
            schedule.enter(model, number - 1)
            yield Phase(number, spec, model)
    finally:
        schedule.leave(model)
