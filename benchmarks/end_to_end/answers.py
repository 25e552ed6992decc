"""Checks of whole models' answers; a variant whose answers are wrong is not timed.

The reference is the replay of the early-exit model's own trace. The trace is trusted if, with the family's exits, it
ends in the plain model's logits. Baselines at full depth are compared with the plain model, the others with the trace.

A row may leave elsewhere than in the replay only if its score lies within rounding of the threshold: the trace, with
noise of that size, must replay to the exit taken. Such flips are counted. For other dtypes than float32 the rounding is
measured on a batch of its own: twice the largest distance of the logits from those in float32, for the plain model and
for the exits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import earlyexit_kernels as ee
from benchmarks.end_to_end.baselines import Answer
from benchmarks.end_to_end.models import Subject, engine_model
from benchmarks.end_to_end.workloads import Fixed
from benchmarks.harness import Checked
from benchmarks.machine import device, distance
from earlyexit_kernels.criteria import Criterion

#: Distance allowed between two ways to compute float32 logits, and the noise that explains a flip.
ROUNDING = 5e-5
NOISY_COPIES = 256
#: As large as the largest batches timed there, since the largest distance grows with the rows.
PROBES = {"cpu": Fixed(32, 32), "cuda": Fixed(128, 128)}


@dataclass(frozen=True)
class Truth:
    """Reference answers of one batch.

    Attributes:
        trace: all exits of all rows.
        plain: the plain model's logits ``[N, C]``.
        rounding: distance allowed from the plain model's logits.
        exit_rounding: distance allowed from the trace.
        wrong: why the trace is not trusted, or empty.
        error: distance of the logits after the last layer from the plain model's, over their spread.
    """

    trace: ee.ExitTrace
    plain: Tensor
    rounding: float
    exit_rounding: float
    wrong: str = ""
    error: float = 0.0


def truth_of(
    subject: Subject,
    engine: str,
    batch: dict[str, Tensor],
    *,
    family: bool = False,
    stored: str = "",
    within: float | None = None,
) -> Truth:
    """Return the reference of a batch under an engine.

    Args:
        subject, engine: model and kind of layers.
        batch: ids and mask.
        family: with the family's exits in place of linear ones.
        stored: type of stored weights.
        within: distance allowed from the plain model's logits over their spread; default: rounding.
    """
    plain, (rounding, exit_rounding) = subject.logits(batch), rounding_of(subject)
    ends = engine_model(subject, engine, family=True, stored=stored).trace(**batch)
    off, spread = distance(ends.logits[:, -1], plain), _spread(plain)
    allowed = rounding if within is None else within * spread
    wrong = "" if off <= allowed else f"its trace ends {off:.2g} off the plain model's logits ({allowed:.2g} allowed)"
    trace = ends if family else engine_model(subject, engine, stored=stored).trace(**batch)
    return Truth(trace, plain, rounding, exit_rounding, wrong, off / spread)


def _spread(logits: Tensor) -> float:
    """Standard deviation of logits ``[N, C]`` about the mean of each class."""
    return float((logits - logits.mean(dim=0)).std()) if len(logits) > 1 else float(logits.std())


@functools.cache
def rounding_of(subject: Subject) -> tuple[float, float]:
    """Return the distances allowed between two ways to compute a model's logits, and its exits' logits."""
    if subject.origin is None:
        return ROUNDING, ROUNDING
    (batch,) = PROBES[device()].build(subject).batches
    both = (subject, subject.origin)
    plain = distance(*(each.logits(batch) for each in both))
    exits = distance(*(each.model.trace(**batch).logits for each in both))
    return 2 * plain, 2 * max(plain, exits)


def check_answers(
    truths: Sequence[Truth],
    answers: Sequence[Answer],
    rule: Criterion | None,
    *,
    layer: int | None = None,
    within: float | None = None,
) -> Checked:
    """Compare the answers to some batches with the reference.

    Args:
        truths, answers: of each batch.
        rule: under which rows leave; None if none does.
        layer: after which all rows are answered without a decision; None is the plain model's own head.
        within: distance allowed from the plain model's logits over their spread; default: rounding.

    Returns:
        What is wrong, or the facts ``layer_rows``, the share of the layer-rows that ran, ``flips``, and ``error``, the
        distance from the plain model's logits after all layers over their spread.
    """
    flips, ran, depth, errors = 0, 0, truths[0].trace.depth, [0.0]
    for truth, (logits, exit_layer) in zip(truths, answers, strict=True):
        rows = torch.arange(len(truth.plain), device=truth.plain.device)
        if truth.wrong and not (exit_layer is None and layer is None):
            return Checked(truth.wrong)
        if exit_layer is None:
            expected, allowed = truth.plain, truth.rounding
            if within is not None:
                allowed = within * _spread(truth.plain)
            if layer is not None:
                expected, allowed = truth.trace.logits[:, layer - 1], truth.exit_rounding
            ran += len(rows) * (layer or depth)
        else:
            exits = exit_layer.to(rows.device)
            moved, unexplained = _flips(truth, rule, exits)
            if unexplained:
                return Checked(unexplained)
            expected, allowed = truth.trace.logits[rows, exits - 1], truth.exit_rounding
            flips, ran = flips + moved, ran + int(exits.sum())
        off = distance(logits, expected)
        errors.append(truth.error if exit_layer is not None else off / _spread(truth.plain))
        if not off <= allowed:
            return Checked(f"its logits are {off:.2g} off the expected ones ({allowed:.2g} allowed)")
    layer_rows = ran / depth / sum(len(truth.plain) for truth in truths)
    return Checked(facts={"layer_rows": layer_rows, "flips": flips, "error": round(max(errors), 7)})


def _flips(truth: Truth, rule: Criterion | None, exits: Tensor) -> tuple[int, str]:
    """Return how many rows left elsewhere than in the replay, and the first one that rounding does not explain."""
    expected = ee.replay(truth.trace, rule)[1]
    if exits.shape != expected.shape or bool(((exits < 1) | (exits > truth.trace.depth)).any()):
        return 0, f"expected {len(expected)} exit layers in 1..{truth.trace.depth}, got {exits.tolist()}"
    moved = (exits != expected).nonzero()[:, 0].tolist()
    generator = torch.Generator().manual_seed(0)
    for row in moved:
        shape = (NOISY_COPIES, *truth.trace.logits.shape[1:])
        noise = truth.exit_rounding * (2 * torch.rand(shape, generator=generator) - 1)
        copies = ee.ExitTrace(truth.trace.logits[row] + noise.to(exits.device))
        if int(exits[row]) not in ee.replay(copies, rule)[1].tolist():
            left = f"row {row} left at layer {int(exits[row])}, in the replay at {int(expected[row])}"
            return 0, f"{left}, and rounding does not explain it"
    return len(moved), ""
