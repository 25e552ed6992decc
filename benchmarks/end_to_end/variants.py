"""The variants of a case: our engines under every mix of exits, and the baselines, each with its reference answers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

import earlyexit_kernels as ee
from benchmarks.end_to_end import models
from benchmarks.end_to_end.answers import Truth, check_answers, truth_of
from benchmarks.end_to_end.baselines import BASELINES, LEAVE_EARLY, PEERS, PLAIN, TRUNCATION, Answer, Answering
from benchmarks.end_to_end.engines import ENGINES, FAMILY_LAYERS, FUSED_LAYERS, engine_model
from benchmarks.end_to_end.forced import FAMILY, FULL, rule_for
from benchmarks.end_to_end.models import Model
from benchmarks.end_to_end.workloads import Work, Workload
from benchmarks.harness import Checked, Implementation, Variant, do_nothing
from benchmarks.machine import NotMeasuredError
from earlyexit_kernels.criteria import Criterion

Builder: TypeAlias = tuple[Variant, Callable[[], Implementation]]


@dataclass(frozen=True)
class Case:
    """One model and its batches, with all variants that are timed together.

    Attributes:
        subject: a name of `models.SUBJECTS`.
        work: builds the batches.
        exits: mixes that our engines run, names of `forced`.
        baselines: names of `BASELINES`; the plain model is always there.
        baseline_exits: the mix for the baselines that leave early.
        dtypes: names of `DTYPES`.
        backends: of our engines' ops.
        one_by_one: a timed call answers one batch, the next in turn; otherwise all of them.
        weight: share of the time that the case gets, relative to a usual one.
        family_exits: mixes that our model runs with the family's layers; default: `exits`.
        engines: names of `ENGINES`.
        narrow_baselines: baselines that are timed in other dtypes than float32 too.
        compared: baselines that our engines are compared with besides the plain model, if both run the same exits or
            the baseline runs all layers.
    """

    subject: str
    work: Work
    exits: tuple[str, ...]
    baselines: tuple[str, ...] = ()
    baseline_exits: str = FULL
    dtypes: tuple[str, ...] = ("float32",)
    backends: tuple[str, ...] = ("auto",)
    one_by_one: bool = False
    weight: float = 1.0
    family_exits: tuple[str, ...] | None = None
    engines: tuple[str, ...] = (FAMILY_LAYERS, FUSED_LAYERS)
    narrow_baselines: tuple[str, ...] = (PLAIN, *sorted(PEERS))
    compared: tuple[str, ...] = ()


def variants_of(case: Case, dtype: str) -> Iterator[Variant]:
    """Yield the variants of a case in one dtype."""
    family = case.exits if case.family_exits is None else case.family_exits
    for exits in case.exits:
        engines = [name for name in case.engines if name != FAMILY_LAYERS or exits in family]
        yield from (Variant(engine, backend, dtype, exits) for engine in engines for backend in case.backends)
    for name in dict.fromkeys((PLAIN, *case.baselines)):
        if dtype == "float32" or name in case.narrow_baselines:
            yield Variant(name, "", dtype, case.baseline_exits if name in LEAVE_EARLY else FULL)


def builders(case: Case, work: Workload, call: Callable[[Answering], Callable[[], Any]]) -> Iterator[Builder]:
    """Yield each variant with a function that builds it.

    Args:
        case: what is timed together.
        work: the batches.
        call: makes the timed call from ``batch -> answer``.
    """
    for dtype in case.dtypes:
        try:
            found = _Variants(models.subject(case.subject, dtype), work, call)
        except NotMeasuredError as error:
            yield Variant("everything", "", dtype, ""), functools.partial(_raise, error)
            continue
        for variant in variants_of(case, dtype):
            build = found.ours if variant.engine in ENGINES else found.baseline
            yield variant, functools.partial(build, variant)


def _raise(error: Exception) -> Any:
    raise error


class _Variants:
    """Builds the variants of one model in one dtype on its batches; traces and criteria are computed once."""

    def __init__(self, subject: models.Subject, work: Workload, call: Callable[[Answering], Callable[[], Any]]) -> None:
        self.subject, self.work, self.call = subject, work, call
        self.truths = functools.cache(self._truths)
        self.rule = functools.cache(self._rule)

    def _truths(self, engine: str, family: bool) -> list[Truth]:
        return [truth_of(self.subject, engine, batch, family=family) for batch in self.work.batches]

    @property
    def first(self) -> list[Truth]:
        """References of the first engine; thresholds come from these, so that all engines decide alike."""
        return self.truths(next(iter(ENGINES)), False)

    def _rule(self, exits: str) -> Criterion | None:
        trace = ee.ExitTrace.cat([truth.trace for truth in self.first])
        return rule_for(exits, trace, trained=self.subject.weights == "trained")

    def ours(self, variant: Variant) -> Implementation:
        """Return a converted model."""
        family, rule = variant.exits == FAMILY, self.rule(variant.exits)
        model = engine_model(self.subject, variant.engine, variant.backend, family=family)
        set_rule = functools.partial(model.set_criterion, rule)
        answer, truths = functools.partial(_answer, model), self.truths(variant.engine, family)
        named = variant._replace(backend=model.explain().backend)
        check = functools.partial(self._check, answer, truths, rule, prepare=set_rule)
        return Implementation(named, self.call(answer), check, set_rule, ours=True, model=model)

    def baseline(self, variant: Variant) -> Implementation:
        """Return a baseline."""
        rule = self.rule(variant.exits)
        # the whole number of layers nearest to the mean exit layer of the mix
        exits = [ee.replay(truth.trace, rule)[1] for truth in self.first]
        layer = round(float(sum(x.sum() for x in exits)) / self.work.rows)
        answer = BASELINES[variant.engine](self.subject, rule, layer)
        cut = layer if variant.engine == TRUNCATION else None
        if cut:
            variant = variant._replace(exits=f"{layer} of {self.subject.depth} layers")
        check = functools.partial(self._check, answer, self.first, None if cut else rule, cut)
        return Implementation(variant, self.call(answer), check)

    def _check(
        self,
        answer: Answering,
        truths: Sequence[Truth],
        rule: Criterion | None,
        layer: int | None = None,
        prepare: Callable[[], Any] = do_nothing,
    ) -> Checked:
        prepare()
        return check_answers(truths, [answer(batch) for batch in self.work.batches], rule, layer)


def _answer(model: Model, batch: dict[str, Tensor]) -> Answer:
    out: Any = model(**batch)
    return out.logits, out.exit_layer
