"""What a training objective is: phases and a loss over the exits; and the task loss every one of them is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from earlyexit_kernels.objectives.arguments import Check, number
from earlyexit_kernels.types import ExitTrace, Gating

#: Parts of a model that a phase may train.
PARTS = ("backbone", "dense", "early_exits", "last_exit", "halting", "uncertainty", "gates", "projectors")
#: What learns first in the methods of two phases, and the two phases' indices.
ENCODER = frozenset({"backbone", "dense", "last_exit"})
BACKBONE, EXITS = 0, 1
#: What a phase may ask to have projected, token by token.
PROJECTIONS = (None, "inputs", "exits")
CLASSIFICATION = frozenset({"single_label_classification"})
ANY_TASK = frozenset({"single_label_classification", "multi_label_classification", "regression"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseSpec:
    """One run of the trainer.

    Attributes:
        name: of the phase.
        trains: the parts of the model that learn, out of `PARTS`; the others are frozen.
        epochs, lr: the paper's own.
        projections: which token projections the loss reads: ``"inputs"`` (of each layer's input, by projectors of
            their own), ``"exits"`` (of each early exit's own features), or None.
        needs_labels: whether the loss reads labels.
        balances: each layer receives the average of the gradients of the exits above it, not their sum.

    Raises:
        ValueError: an unknown part or kind of projection, or a number that is negative or not finite.
    """

    name: str
    trains: frozenset[str] = frozenset(PARTS)
    epochs: float = 3.0
    lr: float = 2e-5
    projections: str | None = None
    needs_labels: bool = True
    balances: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "trains", frozenset(self.trains))
        for name in ("epochs", "lr"):
            object.__setattr__(self, name, number(low=0.0)(f"PhaseSpec({name}=...)", getattr(self, name)))
        unknown = sorted(self.trains - set(PARTS))
        if unknown:
            raise ValueError(f"PhaseSpec(trains=...): expected parts among {PARTS}, got {unknown}")
        if self.projections not in PROJECTIONS:
            raise ValueError(f"PhaseSpec(projections=...): expected one of {PROJECTIONS}, got {self.projections!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingStep:
    """Where in the training a batch stands.

    Attributes:
        problem_type: as in transformers.
        phase: 0-based index into the objective's phases.
        step: optimiser steps done in this phase, or None where nobody counts.
        epoch: epochs done in this phase, fractions included, or None where nobody counts.
    """

    problem_type: str
    phase: int = 0
    step: int | None = None
    epoch: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """Base of the training methods; a subclass is one file and one paper.

    Class attributes:
        name: key of the objectives table and of the saved config.
        tasks: problem types the method has a meaning for.
        rule: the exit rule the paper trains for, a key of the criteria table.
        halting_weight_decay: whether weight decay applies to the halting heads.
        checks: what each argument may be, by its name.

    Raises:
        ValueError: an argument out of range.
    """

    name: ClassVar[str]
    tasks: ClassVar[frozenset[str]] = ANY_TASK
    rule: ClassVar[str]
    halting_weight_decay: ClassVar[bool] = True
    checks: ClassVar[Mapping[str, Check]] = {}

    def __post_init__(self) -> None:
        for name, check in self.checks.items():
            object.__setattr__(self, name, check(f"{type(self).__name__}({name}=...)", getattr(self, name)))

    @property
    def phases(self) -> tuple[PhaseSpec, ...]:
        """The trainer's runs, in order."""
        return (PhaseSpec(name=self.name),)

    def head_changes(self, shares_layers: bool) -> dict[str, Any]:
        """What this paper's exits have that the family's plain ones lack, as changes to `HeadConfig`.

        Args:
            shares_layers: the backbone is one layer used many times, as in ALBERT.
        """
        return {}

    def answering(self) -> dict[str, Any] | None:
        """Data of the criterion by which a model trained so answers where none is chosen.

        None is the last exit at full depth. A method whose answer is another one says which.
        """
        return None

    def gating(self, step: TrainingStep) -> Gating | None:
        """How gates mix a layer's output with its input; None for a method without gates.

        Raises:
            ValueError: it changes on the way, and `step` doesn't say where training stands.
        """
        return None

    def loss(self, trace: ExitTrace, labels: Tensor | None, step: TrainingStep) -> Tensor:
        """The scalar loss of a batch, float32, or float64 where the logits are.

        Args:
            trace: of train mode: logits ``[N, L, C]``, raw aux ``[N, L]``, projections and offsets where asked for.
            labels: ``[N]`` or ``[N, C]``; a row of class -100 carries no loss. None where the phase needs none.
            step: where in the training the batch stands.

        Raises:
            ValueError: the trace or the step lacks what the method reads.
        """
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """The objective as JSON-ready data; `objectives.from_dict` reads it back."""
        return {"name": self.name, **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}}

    def aux(self, trace: ExitTrace, name: str) -> Tensor:
        """The raw scalars ``[N, L]`` the method trains on.

        Raises:
            ValueError: the heads don't produce them.
        """
        if name not in trace.aux:
            raise ValueError(
                f"method {self.name!r} needs heads with a {name!r} output, these produce {list(trace.aux) or 'none'}; "
                f"build them with to_early_exit(..., method={self.name!r})"
            )
        return at_least_float32(trace.aux[name])


def at_least_float32(x: Tensor) -> Tensor:
    """`x` for a loss: float64 stays, anything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def columns(labels: Tensor) -> Tensor:
    """Labels ``[N]`` or ``[N, C]`` as ``[N, 1]`` or ``[N, C]``."""
    return labels[:, None] if labels.dim() == 1 else labels


def _squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits - columns(labels).to(logits.dtype)).square().mean(dim=-1)


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
    return TASK_LOSSES[problem_type](at_least_float32(logits), labels.to(logits.device))


def mean_task_loss(logits: Tensor, labels: Tensor, problem_type: str) -> Tensor:
    """Mean of `task_loss` over the rows that have a label: as in stock models, class -100 means none."""
    return row_mean(task_loss(logits, labels, problem_type), labelled(labels, problem_type, logits))


def exit_losses(logits: Tensor, labels: Tensor | None, problem_type: str) -> Tensor:
    """`task_loss` of each row at each of some exits: ``[N, M]`` of logits ``[N, M, C]``; M may be 0.

    Raises:
        ValueError: no labels, or an unknown problem type.
    """
    rows, exits = logits.shape[:2]
    repeated = columns(needed(labels)).repeat_interleave(exits, dim=0)
    flat = repeated[:, 0] if problem_type == "single_label_classification" else repeated
    return task_loss(logits.flatten(0, 1), flat, problem_type).view(rows, exits)


def needed(labels: Tensor | None) -> Tensor:
    """The labels, or ValueError where there are none."""
    if labels is None:
        raise ValueError("labels: this phase of the method needs them, got None; give labels=... with the batch")
    return labels


def labelled(labels: Tensor | None, problem_type: str, logits: Tensor) -> Tensor:
    """Which rows of ``[N, ...]`` logits carry a loss, ``[N]`` bool; without labels all do."""
    if labels is None or problem_type != "single_label_classification":
        return torch.ones(logits.shape[0], dtype=torch.bool, device=logits.device)
    return labels.to(logits.device).view(-1) != IGNORED


def row_mean(values: Tensor, rows: Tensor, *, everywhere: bool = False) -> Tensor:
    """Mean of values ``[N, ...]`` over the rows that count; 0 where there are none.

    Args:
        values: ``[N, ...]``.
        rows: ``[N]`` bool.
        everywhere: over the rows of all processes of a distributed run.
    """
    total = values.masked_fill(~rows.view(-1, *[1] * (values.dim() - 1)), 0.0).sum(dim=0)
    count = rows.sum().to(values.dtype)
    if everywhere:
        total, count = distributed_mean(total), distributed_mean(count)
    return total / count.where(count > 0, 1.0)


def distributed_mean(x: Tensor) -> Tensor:
    """The mean of `x` over the processes of a distributed run, gradients included; `x` itself in a single one.

    For a loss that isn't linear in its rows: each process must compute it from the numbers of the whole batch. Under
    DistributedDataParallel, which averages the gradients of the processes, they equal those of one process.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return x
    from torch.distributed.nn.functional import all_reduce

    return all_reduce(x) / distributed.get_world_size()
