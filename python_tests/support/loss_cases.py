"""All training methods in all modes, on one small seeded trace that can be split into rows."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from earlyexit_kernels.methods import (
    Berxit,
    Dact,
    Deebert,
    Ensemble,
    Fastbert,
    Joint,
    Method,
    Palbert,
    Smartbert,
    TrainingStep,
)
from earlyexit_kernels.types import ExitTrace

ROWS, DEPTH, CLASSES, WIDTH = 6, 4, 3, 5
LENGTHS = (3, 1, 4, 2, 5, 2)
SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
AUX = ("halting", "uncertainty", "gate")


@dataclasses.dataclass(frozen=True)
class Case:
    """One method at one position of its training.

    Attributes:
        exits: the exits, from 0, whose logits have a gradient.
        aux: scalars with a gradient, and their layers from 0.
        projected: whether token projections have a gradient.
        linear: whether the loss of a batch is the mean of the losses of its halves.
        detached: whether an input of the loss is detached, so that finite differences differ.
    """

    method: Method
    exits: tuple[int, ...] = (0, 1, 2, 3)
    aux: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    projected: bool = False
    problem_type: str = SINGLE
    phase: int = 0
    step: int | None = None
    linear: bool = True
    detached: bool = False

    @property
    def at(self) -> TrainingStep:
        return TrainingStep(problem_type=self.problem_type, phase=self.phase, step=self.step)

    def loss(self, trace: ExitTrace, labels: Tensor | None) -> Tensor:
        return self.method.loss(trace, labels, self.at)

    def trace(self, dtype: torch.dtype = torch.float64, depth: int = DEPTH) -> ExitTrace:
        """Return the trace of this case; its tensors are leaves that require gradients."""
        g = torch.Generator().manual_seed(1)
        classes = 1 if self.problem_type == REGRESSION else CLASSES
        logits = 2 * torch.randn(ROWS, depth, classes, generator=g, dtype=torch.float64)
        aux = {name: torch.randn(ROWS, depth, generator=g, dtype=torch.float64).to(dtype) for name in AUX}
        exits = self.method.phases[self.phase].projections == "exits"
        projections = torch.randn(depth - exits, sum(LENGTHS), WIDTH, generator=g, dtype=torch.float64)
        offsets = torch.tensor((0, *LENGTHS)).cumsum(0).to(torch.int32)
        trace = ExitTrace(logits.to(dtype), aux, projections=projections.to(dtype), offsets=offsets)
        for tensor in tensors(trace).values():
            tensor.requires_grad_()
        return trace

    def labels(self) -> Tensor:
        if self.problem_type == REGRESSION:
            return torch.linspace(-1, 2, ROWS)
        single = torch.arange(ROWS) % CLASSES
        return single if self.problem_type == SINGLE else (single[:, None] >= torch.arange(CLASSES)).float()


EVERY = (0, 1, 2, 3)
CASES = {
    "joint": Case(Joint()),
    "joint, balanced": Case(Joint(equilibrium=True)),
    "joint, several labels": Case(Joint(), problem_type=MULTI),
    "joint, regression": Case(Joint(), problem_type=REGRESSION),
    "palbert": Case(Palbert(), aux={"halting": (0, 1, 2)}),
    "palbert, halting": Case(Palbert(halting_phase=True), exits=(), aux={"halting": (0, 1, 2)}, phase=1, detached=True),
    "palbert, open tail": Case(Palbert(close_tail=False), aux={"halting": EVERY}),
    "palbert, posterior first": Case(Palbert(kl="posterior_prior", prior=0.3), aux={"halting": (0, 1, 2)}),
    "palbert, posterior first, open": Case(
        Palbert(kl="posterior_prior", close_tail=False, beta=2), aux={"halting": EVERY}
    ),
    "palbert, several labels": Case(Palbert(), aux={"halting": (0, 1, 2)}, problem_type=MULTI),
    "palbert, regression": Case(Palbert(), aux={"halting": (0, 1, 2)}, problem_type=REGRESSION),
    "ensemble": Case(Ensemble()),
    "ensemble, by depth": Case(Ensemble(weights="depth", diversity=0.5)),
    "ensemble, by batch": Case(Ensemble(min_over="batch", diversity=0.5), linear=False),
    "ensemble, detached": Case(Ensemble(detach_target=True), detached=True),
    "ensemble, capped, not the last": Case(Ensemble(cap=1.5, skip_last=True)),
    "dact, all exits first": Case(Dact()),
    "dact, last exit first": Case(Dact(start="last"), exits=(3,)),
    "dact": Case(Dact(), aux={"halting": EVERY}, phase=1),
    "dact, without p_N": Case(Dact(start=None, include_last=False, ponder=0.3), aux={"halting": (0, 1, 2)}),
    "deebert, encoder": Case(Deebert(), exits=(3,)),
    "deebert, exits": Case(Deebert(), exits=(0, 1, 2), phase=1),
    "deebert, several labels": Case(Deebert(), exits=(0, 1, 2), phase=1, problem_type=MULTI),
    "deebert, regression": Case(Deebert(), exits=(3,), problem_type=REGRESSION),
    "berxit, even": Case(Berxit(), exits=(3,), aux={"uncertainty": EVERY}, step=2),
    "berxit, odd": Case(Berxit(), aux={"uncertainty": EVERY}, step=5),
    "berxit, odd without the last": Case(
        Berxit(odd_includes_last=False), exits=(0, 1, 2), aux={"uncertainty": EVERY}, step=1
    ),
    "berxit, encoder": Case(Berxit(strategy="two_stage"), exits=(3,)),
    "berxit, exits": Case(Berxit(strategy="two_stage"), exits=(0, 1, 2), aux={"uncertainty": EVERY}, phase=1),
    "berxit, joint": Case(Berxit(strategy="joint", learned_weight=0.5), aux={"uncertainty": EVERY}),
    "berxit, by depth": Case(Berxit(strategy="weight_linear"), aux={"uncertainty": EVERY}),
    "berxit, regression": Case(Berxit(), aux={"uncertainty": EVERY}, problem_type=REGRESSION, step=1, detached=True),
    "fastbert, encoder": Case(Fastbert(), exits=(3,)),
    "fastbert, exits": Case(Fastbert(), exits=(0, 1, 2), phase=1, detached=True),
    "fastbert, student first": Case(Fastbert(kl="student_teacher"), exits=(0, 1, 2), phase=1, detached=True),
    "smartbert, encoder": Case(Smartbert(), exits=(3,), aux={"gate": EVERY}, projected=True, linear=False),
    "smartbert, linear penalty": Case(
        Smartbert(gate_penalty="linear", positive_backbone=False), exits=(3,), aux={"gate": EVERY}, projected=True
    ),
    "smartbert, nothing projected": Case(Smartbert(contrast_backbone=0), exits=(3,), aux={"gate": EVERY}, linear=False),
    "smartbert, exits": Case(Smartbert(), exits=(0, 1, 2), projected=True, phase=1),
    "smartbert, exits, own positive": Case(Smartbert(positive_exits=True), exits=(0, 1, 2), projected=True, phase=1),
}


def tensors(trace: ExitTrace) -> dict[str, Tensor]:
    """Return the differentiable tensors of a trace by name."""
    assert trace.projections is not None
    return {"logits": trace.logits, **trace.aux, "projections": trace.projections}


def rebuilt(trace: ExitTrace, values: dict[str, Tensor]) -> ExitTrace:
    """Return the trace with other tensors in place of those of `tensors`."""
    aux = {name: values[name] for name in trace.aux}
    return ExitTrace(values["logits"], aux, projections=values["projections"], offsets=trace.offsets)


def take(trace: ExitTrace, rows: list[int]) -> ExitTrace:
    """Return some rows of a trace in the given order, differentiably."""
    assert trace.projections is not None and trace.offsets is not None
    ends = trace.offsets.tolist()
    tokens = [t for row in rows for t in range(ends[row], ends[row + 1])]
    lengths = [ends[row + 1] - ends[row] for row in rows]
    offsets = torch.tensor((0, *lengths)).cumsum(0).to(torch.int32)
    aux = {name: raw[rows] for name, raw in trace.aux.items()}
    return ExitTrace(trace.logits[rows], aux, projections=trace.projections[:, tokens], offsets=offsets)
