"""Nothing is timed whose answers are wrong.

The truth is the replay of the early-exit model's own trace. That trace is trusted where, with the family's heads, it
ends in the plain model's logits. Baselines at full depth are held to the plain model's logits, the others to the trace.

A row may leave elsewhere than in the replay only where its score lies within rounding of the threshold: where the
trace, with noise of that size, replays to the exit it took. Such flips are counted. For other dtypes than float32 the
rounding is what the plain model shows, and for the exits what these show: twice the largest distance of their logits
from those in float32, on a batch of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import earlyexit_kernels as ee
from benchmarks.end_to_end.baselines import Answer
from benchmarks.end_to_end.engines import engine_model
from benchmarks.end_to_end.models import Subject, device
from benchmarks.end_to_end.workloads import Fixed
from earlyexit_kernels.criteria import Criterion

#: Distance allowed between float32 logits of two ways to compute them, and the noise that explains a flip.
ROUNDING = 5e-5
NOISY_COPIES = 256
#: As large as the largest batches that are timed there: of more rows the largest distance is larger.
PROBES = {"cpu": Fixed(32, 32), "cuda": Fixed(128, 128)}


@dataclass(frozen=True)
class Truth:
    """What one batch must be answered with.

    Attributes:
        trace: every exit of every row.
        plain: the plain model's logits ``[N, C]``.
        rounding: distance allowed from the plain model's logits.
        exit_rounding: from the trace.
        wrong: why the trace isn't to be trusted, or empty.
    """

    trace: ee.ExitTrace
    plain: Tensor
    rounding: float
    exit_rounding: float
    wrong: str = ""


@dataclass(frozen=True)
class Verdict:
    """Whether a contender may be timed.

    Attributes:
        refused: why not, or empty.
        flips: rows that left elsewhere, within rounding.
        layer_rows: share of the layer-rows that ran.
    """

    refused: str
    flips: int
    layer_rows: float


def truth_of(subject: Subject, engine: str, batch: dict[str, Tensor], *, family: bool = False) -> Truth:
    """The trace of a batch under an engine, with linear exits or the family's, held against the plain model."""
    plain, (rounding, exit_rounding) = subject.logits(batch), rounding_of(subject)
    ends = engine_model(subject, engine, family=True).trace(**batch)
    off = _distance(ends.logits[:, -1], plain)
    wrong = "" if off <= rounding else f"its trace ends {off:.2g} off the plain model's logits ({rounding:.2g} allowed)"
    trace = ends if family else engine_model(subject, engine).trace(**batch)
    return Truth(trace, plain, rounding, exit_rounding, wrong)


@functools.cache
def rounding_of(subject: Subject) -> tuple[float, float]:
    """Distance allowed between two ways to compute a model's logits, and between two ways to compute its exits'."""
    if subject.origin is None:
        return ROUNDING, ROUNDING
    (batch,) = PROBES[device()].build(subject).batches
    both = (subject, subject.origin)
    plain = _distance(*(each.logits(batch) for each in both))
    exits = _distance(*(each.model.trace(**batch).logits for each in both))
    return 2 * plain, 2 * max(plain, exits)


def verdict(
    truths: Sequence[Truth], answers: Sequence[Answer], rule: Criterion | None, layer: int | None = None
) -> Verdict:
    """Hold the answers to some batches against the truth.

    Args:
        truths, answers: of each batch.
        rule: who may leave; None where nobody does.
        layer: at which all rows are answered without a decision; None is the plain model's own head.
    """
    flips, ran = 0, 0
    depth = truths[0].trace.depth
    for truth, (logits, exit_layer) in zip(truths, answers, strict=True):
        rows = torch.arange(len(truth.plain), device=truth.plain.device)
        if truth.wrong and not (exit_layer is None and layer is None):
            return Verdict(truth.wrong, 0, 0.0)
        if exit_layer is None:
            expected, allowed = truth.plain, truth.rounding
            if layer is not None:
                expected, allowed = truth.trace.logits[:, layer - 1], truth.exit_rounding
            ran += len(rows) * (layer or depth)
        else:
            exits = exit_layer.to(rows.device)
            moved, unexplained = _flips(truth, rule, exits)
            if unexplained:
                return Verdict(unexplained, 0, 0.0)
            expected, allowed = truth.trace.logits[rows, exits - 1], truth.exit_rounding
            flips, ran = flips + moved, ran + int(exits.sum())
        off = _distance(logits, expected)
        if not off <= allowed:
            return Verdict(f"its logits are {off:.2g} off the expected ones ({allowed:.2g} allowed)", 0, 0.0)
    return Verdict("", flips, ran / depth / sum(len(truth.plain) for truth in truths))


def _flips(truth: Truth, rule: Criterion | None, exits: Tensor) -> tuple[int, str]:
    """Rows that left elsewhere than in the replay, and what is wrong where rounding doesn't explain one."""
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
            return 0, f"{left}, and rounding doesn't explain it"
    return len(moved), ""


def _distance(got: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; infinite where shapes differ, NaN where either is."""
    if got.shape != expected.shape:
        return float("inf")
    return float((got.float().to(expected.device) - expected).abs().max())
