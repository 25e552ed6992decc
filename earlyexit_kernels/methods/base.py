"""Base class of the training methods, and the task losses that they share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from earlyexit_kernels.arguments import Check, check_fields, choice, number
from earlyexit_kernels.types import ANY_TASK, ExitTrace, Gating

#: Parts of a model that a phase may train.
PARTS = ("backbone", "dense", "early_exits", "last_exit", "halting", "uncertainty", "gates", "projectors")
#: Parts that learn in the first phase of two-phase methods, and the indices of the two phases.
ENCODER = frozenset({"backbone", "dense", "last_exit"})
BACKBONE, EXITS = 0, 1
#: Advice for messages about methods that need the loop over phases.
LOOP = (
    "train with `for phase in earlyexit_kernels.phases(model): Trainer(model, args=phase.args(base), "
    "callbacks=phase.callbacks(), ...).train()`"
)
#: Checks of a phase's fields: `projections` are the token projections that its loss may read.
PHASE_CHECKS: dict[str, Check] = {
    "epochs": number(low=0.0),
    "lr": number(low=0.0),
    "projections": choice(None, "inputs", "exits"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseSpec:
    """One run of the trainer.

    Attributes:
        name: of the phase.
        trains: the parts of the model that learn, a subset of `PARTS`; the others are frozen.
        epochs: number of epochs in the paper.
        lr: learning rate in the paper.
        projections: the token projections that the loss reads: ``"inputs"`` (of each layer's input), ``"exits"`` (of
            each early exit's features), or None.
        needs_labels: whether the loss reads labels.
        balances: whether each layer receives the average of the gradients of the exits above it instead of their sum.
        other_rows: whether it is meant for rows that the phases before it have not trained on.

    Raises:
        ValueError: an unknown part or kind of projection, or a number that is negative or not finite.

    Example:
        >>> import earlyexit_kernels as ee
        >>> ee.methods.PhaseSpec(name="exits", trains={"early_exits"}, epochs=2, lr=1e-4).epochs
        2.0
    """

    name: str
    trains: frozenset[str] = frozenset(PARTS)
    epochs: float = 3.0
    lr: float = 2e-5
    projections: str | None = None
    needs_labels: bool = True
    balances: bool = False
    other_rows: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "trains", frozenset(self.trains))
        check_fields(self, PHASE_CHECKS)
        unknown = sorted(self.trains - set(PARTS))
        if unknown:
            raise ValueError(f"PhaseSpec(trains=...): expected parts among {PARTS}, got {unknown}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingStep:
    """Position of a batch in the training.

    Attributes:
        problem_type: as in transformers.
        phase: 0-based index into the method's phases.
        step: number of optimiser steps done in this phase, or None if it is unknown.
        epoch: number of epochs done in this phase, with fractions, or None if it is unknown.

    Example:
        >>> import earlyexit_kernels as ee
        >>> ee.methods.TrainingStep(problem_type="regression").phase
        0
    """

    problem_type: str
    phase: int = 0
    step: int | None = None
    epoch: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """Base class of the training methods.

    A subclass is a frozen dataclass with keyword-only fields that implements `loss`, and `phases`, `head_changes`,
    `answering` and `gating` where they differ from the defaults.

    Class attributes:
        name: key of the methods table and of the saved config.
        tasks: problem types that the method is defined for.
        rule: the exit rule that the paper trains for, a key of the criteria table.
        halting_weight_decay: whether weight decay applies to the halting heads.
        checks: check of each field, by name.
        when_missing: value of a field that saved data lacks, where the method had not its default before it had the
            field.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> import earlyexit_kernels as ee
        >>> isinstance(ee.methods.Joint(), ee.methods.Method)
        True
    """

    name: ClassVar[str]
    tasks: ClassVar[frozenset[str]] = ANY_TASK
    rule: ClassVar[str]
    halting_weight_decay: ClassVar[bool] = True
    checks: ClassVar[Mapping[str, Check]] = {}
    when_missing: ClassVar[Mapping[str, Any]] = {}

    def __post_init__(self) -> None:
        check_fields(self, self.checks)

    @property
    def phases(self) -> tuple[PhaseSpec, ...]:
        """The runs of the trainer, in order."""
        return (PhaseSpec(name=self.name),)

    def head_changes(self, shares_layers: bool) -> dict[str, Any]:
        """Return the fields of `HeadConfig` in which the exits of this method differ from the family's plain ones.

        Args:
            shares_layers: whether the backbone uses one layer several times, as ALBERT does.
        """
        return {}

    def at_depth(self, depth: int) -> Method:
        """Return the method with the settings that follow from the number of layers; a model uses and saves these.

        Args:
            depth: L of the model.
        """
        return self

    def answering(self) -> dict[str, Any] | None:
        """Return the data of the default criterion of a model trained by this method.

        None is the last exit at full depth; a method that defines another answer returns its criterion.
        """
        return None

    def gating(self, step: TrainingStep) -> Gating | None:
        """Return how gates mix a layer's output with its input; None for a method without gates.

        Raises:
            ValueError: it changes during training, and `step` lacks the position.
        """
        return None

    def loss(self, trace: ExitTrace, labels: Tensor | None, step: TrainingStep) -> Tensor:
        """Return the scalar loss of a batch, in float64 where the logits are float64, else in float32.

        Args:
            trace: in train mode: logits ``[N, L, C]``, raw scalars ``[N, L]``, and the projections and offsets that the
                phase requires.
            labels: ``[N]`` or ``[N, C]``; a row of class -100 has no loss. None where the phase requires none.
            step: position of the batch in the training.

        Raises:
            ValueError: the trace or the step lacks what the method reads.
        """
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Return the method as JSON-ready data, which `methods.from_dict` reads back."""
        return {"name": self.name, **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}}

    def aux(self, trace: ExitTrace, name: str) -> Tensor:
        """Return raw scalars ``[N, L]`` of the trace.

        Raises:
            ValueError: the heads do not produce them.
        """
        if name not in trace.aux:
            raise ValueError(
                f"method {self.name!r} needs heads with the output {name!r}, these produce "
                f"{list(trace.aux) or 'none'}; build them with to_early_exit(..., method={self.name!r})"
            )
        return at_least_float32(trace.aux[name])


def at_least_float32(x: Tensor) -> Tensor:
    """Return `x` in float64 if it is float64, else in float32."""
    return x if x.dtype == torch.float64 else x.float()


def columns(labels: Tensor) -> Tensor:
    """Return labels ``[N]`` as ``[N, 1]``, and labels ``[N, C]`` unchanged."""
    return labels[:, None] if labels.dim() == 1 else labels


def _squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits - columns(labels).to(logits.dtype)).square().mean(dim=-1)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels.view(-1), reduction="none")


def _binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none").mean(dim=-1)


#: Class that marks a row without a label, as in torch's cross entropy.
IGNORED = -100

TASK_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "regression": _squared_error,
    "single_label_classification": _cross_entropy,
    "multi_label_classification": _binary_cross_entropy,
}


def task_loss(logits: Tensor, labels: Tensor, problem_type: str) -> Tensor:
    """Return the loss of each row ``[N]``: squared error, cross entropy or binary cross entropy.

    Args:
        logits: of one exit, ``[N, C]``.
        labels: ``[N]``, or ``[N, C]`` where a row has several.
        problem_type: as in transformers.

    Raises:
        ValueError: an unknown problem type.

    Example:
        >>> import torch
        >>> import earlyexit_kernels as ee
        >>> ee.methods.task_loss(torch.tensor([[1.0], [3.0]]), torch.tensor([1.0, 1.0]), "regression").tolist()
        [0.0, 4.0]
    """
    if problem_type not in TASK_LOSSES:
        raise ValueError(f"problem_type: expected one of {sorted(TASK_LOSSES)}, got {problem_type!r}")
    return TASK_LOSSES[problem_type](at_least_float32(logits), labels.to(logits.device))


def mean_task_loss(logits: Tensor, labels: Tensor, problem_type: str) -> Tensor:
    """Return the mean of `task_loss` over the rows with a label; as in stock models, class -100 means none.

    Example:
        >>> import torch
        >>> import earlyexit_kernels as ee
        >>> logits, labels = torch.zeros(2, 2), torch.tensor([0, -100])
        >>> round(ee.methods.mean_task_loss(logits, labels, "single_label_classification").item(), 4)
        0.6931
    """
    return row_mean(task_loss(logits, labels, problem_type), labelled(labels, problem_type, logits))


def exit_losses(logits: Tensor, labels: Tensor | None, problem_type: str) -> Tensor:
    """Return the `task_loss` of each row at each of M exits, ``[N, M]`` for logits ``[N, M, C]``; M may be 0.

    Raises:
        ValueError: no labels, or an unknown problem type.
    """
    rows, exits = logits.shape[:2]
    repeated = columns(needed(labels)).repeat_interleave(exits, dim=0)
    flat = repeated[:, 0] if problem_type == "single_label_classification" else repeated
    return task_loss(logits.flatten(0, 1), flat, problem_type).view(rows, exits)


def layer_numbers(losses: Tensor) -> Tensor:
    """Return 1..M ``[M]`` for losses ``[N, M]`` of M exits."""
    return torch.arange(1, losses.shape[1] + 1, device=losses.device, dtype=losses.dtype)


def needed(labels: Tensor | None) -> Tensor:
    """Return the labels.

    Raises:
        ValueError: there are none.
    """
    if labels is None:
        raise ValueError("labels: this phase of the method needs them, got None; give labels=... with the batch")
    return labels


def labelled(labels: Tensor | None, problem_type: str, logits: Tensor) -> Tensor:
    """Return which rows have a loss, ``[N]`` bool; without labels all of them."""
    if labels is None or problem_type != "single_label_classification":
        return torch.ones(logits.shape[0], dtype=torch.bool, device=logits.device)
    return labels.to(logits.device).view(-1) != IGNORED


def row_mean(values: Tensor, rows: Tensor, *, everywhere: bool = False) -> Tensor:
    """Return the mean of values over some rows; 0 where there are none.

    Args:
        values: ``[N, ...]``.
        rows: the rows that count, ``[N]`` bool.
        everywhere: average over the rows of all processes of a distributed run.
    """
    total = values.masked_fill(~rows.view(-1, *[1] * (values.dim() - 1)), 0.0).sum(dim=0)
    count = rows.sum().to(values.dtype)
    if everywhere:
        total, count = distributed_mean(total), distributed_mean(count)
    return total / count.where(count > 0, 1.0)


def distributed_mean(x: Tensor) -> Tensor:
    """Return the mean of `x` over the processes of a distributed run, differentiably; `x` itself in a single process.

    A loss that is not linear in its rows must be computed from the numbers of the whole batch in each process. Under
    DistributedDataParallel, which averages the gradients of the processes, they then equal those of one process.

    Example:
        >>> import torch
        >>> import earlyexit_kernels as ee
        >>> ee.methods.distributed_mean(torch.tensor(2.0)).item()
        2.0
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return x
    from torch.distributed.nn.functional import all_reduce

    return all_reduce(x) / distributed.get_world_size()
