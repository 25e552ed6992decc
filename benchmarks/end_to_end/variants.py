"""Builds the variants of a case, each with the check of its answers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

from torch import Tensor

import earlyexit_kernels as ee
from benchmarks.end_to_end import models
from benchmarks.end_to_end.answers import Truth, check_answers, truth_of
from benchmarks.end_to_end.baselines import BASELINES, TRUNCATION, Answer, Answering
from benchmarks.end_to_end.forced import FAMILY, rule_for
from benchmarks.end_to_end.models import (
    CALLS_TO_CAPTURE,
    CAPTURED_LAYERS,
    ENGINES,
    FAMILY_LAYERS,
    FUSED_LAYERS,
    Model,
    engine_model,
    refused_captures,
)
from benchmarks.end_to_end.suites import WITHIN, Case
from benchmarks.end_to_end.workloads import Workload
from benchmarks.harness import Checked, Implementation, Variant, do_nothing
from benchmarks.machine import NotMeasuredError
from earlyexit_kernels.criteria import Criterion

Builder: TypeAlias = tuple[Variant, Callable[[], Implementation]]


def builders(case: Case, work: Workload, call: Callable[[Answering], Callable[[], Any]]) -> Iterator[Builder]:
    """Yield each variant with a function that builds it.

    Args:
        case: what is timed together.
        work: the batches.
        call: makes the timed call from ``batch -> answer``.
    """
    for dtype, named in case.by_dtype().items():
        try:
            variants = _Variants(models.subject(case.subject, dtype), work, call, stored=case.stored)
        except NotMeasuredError as error:
            yield Variant("everything", "", dtype, ""), functools.partial(_raise, error)
            continue
        for variant in named:
            build = variants.ours if variant.engine in ENGINES else variants.baseline
            yield variant, functools.partial(build, variant)


def _raise(error: Exception) -> Any:
    raise error


class _Variants:
    """Builds the variants of one model in one dtype on its batches; traces and criteria are computed once.

    Args:
        subject: the model.
        work: the batches.
        call: makes the timed call from ``batch -> answer``.
        stored: whether the dtypes of our variants are those of stored weights, which have exits of their own.
    """

    def __init__(
        self,
        subject: models.Subject,
        work: Workload,
        call: Callable[[Answering], Callable[[], Any]],
        *,
        stored: bool,
    ) -> None:
        self.subject, self.work, self.call, self.stored = subject, work, call, stored
        self.truths = functools.cache(self._truths)
        self.rule = functools.cache(self._rule)

    def _truths(self, engine: str, family: bool = False, stored: str = "") -> list[Truth]:
        within = WITHIN[stored] if stored else None
        found = functools.partial(truth_of, self.subject, engine, family=family, stored=stored, within=within)
        return [found(batch) for batch in self.work.batches]

    def _rule(self, exits: str, stored: str = "") -> Criterion | None:
        """The thresholds come from one kind of layers, so that all engines decide alike."""
        truths = self.truths(FUSED_LAYERS, stored=stored) if stored else self.truths(FAMILY_LAYERS)
        trace = ee.ExitTrace.cat([truth.trace for truth in truths])
        return rule_for(exits, trace, trained=self.subject.weights == "trained")

    def ours(self, variant: Variant) -> Implementation:
        """Return a converted model."""
        stored = variant.dtype if self.stored else ""
        family, rule = variant.exits == FAMILY, self.rule(variant.exits, stored)
        model = engine_model(self.subject, variant.engine, variant.backend, family=family, stored=stored)
        set_rule = functools.partial(model.set_criterion, rule)
        answer, truths = functools.partial(_answer, model), self.truths(variant.engine, family, stored)
        named = variant._replace(backend=model.explain().backend)
        captured = model if variant.engine == CAPTURED_LAYERS else None
        check = functools.partial(self._check, answer, truths, rule, prepare=set_rule, captured=captured)
        return Implementation(named, self.call(answer), check, set_rule, ours=True, model=model)

    def baseline(self, variant: Variant) -> Implementation:
        """Return a baseline."""
        rule, truths = self.rule(variant.exits), self.truths(FAMILY_LAYERS)
        # the whole number of layers nearest to the mean exit layer of the mix
        exits = [ee.replay(truth.trace, rule)[1] for truth in truths]
        layer = round(float(sum(x.sum() for x in exits)) / self.work.rows)
        answer = BASELINES[variant.engine](self.subject, rule, layer)
        cut = layer if variant.engine == TRUNCATION else None
        if cut:
            variant = variant._replace(exits=f"{layer} of {self.subject.depth} layers")
        within = WITHIN[variant.dtype] if self.stored else None
        check = functools.partial(self._check, answer, truths, None if cut else rule, layer=cut, within=within)
        return Implementation(variant, self.call(answer), check)

    def _check(
        self,
        answer: Answering,
        truths: Sequence[Truth],
        rule: Criterion | None,
        *,
        prepare: Callable[[], Any] = do_nothing,
        captured: Model | None = None,
        **how: Any,
    ) -> Checked:
        """Check the answers to all batches; of captured layers those of replays, and that there are any."""
        prepare()
        for _ in range(1 if captured is None else CALLS_TO_CAPTURE):
            answers = [answer(batch) for batch in self.work.batches]
        if captured is not None and (reason := refused_captures(captured)):
            return Checked(reason)
        return check_answers(truths, answers, rule, **how)


def _answer(model: Model, batch: dict[str, Tensor]) -> Answer:
    out: Any = model(**batch)
    return out.logits, out.exit_layer
