"""Who takes part in a case: our engines under every exit mix, and the baselines, each with the truth it is held to."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

import earlyexit_kernels as ee
from benchmarks.end_to_end import models
from benchmarks.end_to_end.baselines import BASELINES, LEAVE_EARLY, PEERS, PLAIN, TRUNCATION, Answer, Answering
from benchmarks.end_to_end.check import Truth, Verdict, truth_of, verdict
from benchmarks.end_to_end.engines import ENGINES, FAMILY_LAYERS, FUSED_LAYERS, engine_model
from benchmarks.end_to_end.forced import FAMILY, FULL, rule_for
from benchmarks.end_to_end.models import Model, NotMeasuredError, Subject
from benchmarks.end_to_end.workloads import Workload
from earlyexit_kernels.criteria import Criterion


class Work(Protocol):
    """What builds a workload once the model is there."""

    @property
    def name(self) -> str:
        """In words."""

    def build(self, subject: Subject) -> Workload:
        """The batches."""


@dataclass(frozen=True)
class Case:
    """What is timed together.

    Attributes:
        subject: a name of `models.SUBJECTS`.
        work: its batches.
        exits: what our engines run, names of `forced`.
        baselines: names of `BASELINES`; the plain model is always there.
        baseline_exits: the mix for the baselines that leave early.
        dtypes: names of `models.DTYPES`.
        backends: of our engines' ops.
        one_by_one: a timed call answers one batch, the next in turn; otherwise all of them.
        weight: how many times a usual case's share of the time it gets.
        family_exits: what our model runs with its family's layers; default: `exits`.
        engines: names of `ENGINES`.
        narrow_baselines: those timed in other dtypes than float32 too.
        compared: baselines that ours are compared with beside the plain model, where both run the same exits or the
            baseline runs all layers.
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


class Said(NamedTuple):
    """What records say of a contender."""

    engine: str
    backend: str
    dtype: str
    exits: str


class LeftOut(NamedTuple):
    """Something that can't be timed here, and why."""

    said: Said
    why: str


@dataclass(frozen=True, eq=False)
class Contender:
    """Something that answers batches.

    Attributes:
        said: its names.
        answer: batch -> logits ``[N, C]`` and exit layers ``[N]`` or None.
        ready: called before each call, untimed.
        truths: what its answers are held to, for each batch.
        rule: who may leave.
        layer: after which all rows are answered without a decision, or None.
    """

    said: Said
    answer: Answering
    ready: Callable[[], None]
    truths: Sequence[Truth]
    rule: Criterion | None = None
    layer: int | None = None

    @property
    def ours(self) -> bool:
        """Whether it is one of our engines."""
        return self.said.engine in ENGINES

    def judged(self, work: Workload) -> Verdict:
        """Whether it may be timed; one that fails is refused with its error."""
        try:
            self.ready()
            answers = [self.answer(batch) for batch in work.batches]
        except Exception as error:
            first_line = str(error).partition("\n")[0]
            return Verdict(f"{type(error).__name__}: {first_line}", 0, 0.0)
        return verdict(self.truths, answers, self.rule, self.layer)


def line_up(case: Case, work: Workload) -> tuple[list[Contender], list[LeftOut]]:
    """All that can be timed, and what can't."""
    contenders: list[Contender] = []
    left_out: list[LeftOut] = []
    for dtype in case.dtypes:
        try:
            stage = _Stage(models.subject(case.subject, dtype), work)
        except NotMeasuredError as error:
            left_out.append(LeftOut(Said("everything", "", dtype, ""), str(error)))
            continue
        for said in _wanted(case, dtype):
            try:
                contenders.append(stage.ours(said) if said.engine in ENGINES else stage.baseline(said))
            except NotMeasuredError as error:
                left_out.append(LeftOut(said, str(error)))
    return contenders, left_out


def _wanted(case: Case, dtype: str) -> Iterator[Said]:
    family = case.exits if case.family_exits is None else case.family_exits
    for exits in case.exits:
        engines = [name for name in case.engines if name != FAMILY_LAYERS or exits in family]
        yield from (Said(engine, backend, dtype, exits) for engine in engines for backend in case.backends)
    for name in dict.fromkeys((PLAIN, *case.baselines)):
        if dtype != "float32" and name not in case.narrow_baselines:
            continue
        yield Said(name, "", dtype, case.baseline_exits if name in LEAVE_EARLY else FULL)


class _Stage:
    """One model in one dtype before its batches: the traces, the rules that come from them, and the contenders."""

    def __init__(self, subject: Subject, work: Workload) -> None:
        self.subject, self.work = subject, work
        self.truths = functools.cache(self._truths)
        self.rule = functools.cache(self._rule)

    def _truths(self, engine: str, family: bool) -> list[Truth]:
        return [truth_of(self.subject, engine, batch, family=family) for batch in self.work.batches]

    @property
    def first(self) -> list[Truth]:
        """Of the first engine: rules come from these, so that all engines decide alike."""
        return self.truths(next(iter(ENGINES)), False)

    def _rule(self, exits: str) -> Criterion | None:
        trace = ee.ExitTrace.cat([truth.trace for truth in self.first])
        return rule_for(exits, trace, trained=self.subject.trained)

    def ours(self, said: Said) -> Contender:
        """A converted model."""
        family = said.exits == FAMILY
        rule = self.rule(said.exits)
        model = engine_model(self.subject, said.engine, said.backend, family=family)
        return Contender(
            said._replace(backend=model.backend),
            functools.partial(_answers, model),
            functools.partial(model.set_criterion, rule),
            self.truths(said.engine, family),
            rule,
        )

    def baseline(self, said: Said) -> Contender:
        """Somebody else's way."""
        rule = self.rule(said.exits)
        # as near to the layers that the mix runs as whole layers come
        exits = [ee.replay(truth.trace, rule)[1] for truth in self.first]
        layer = round(float(sum(x.sum() for x in exits)) / self.work.rows)
        answer = BASELINES[said.engine](self.subject, rule, layer)
        if said.engine != TRUNCATION:
            return Contender(said, answer, lambda: None, self.first, rule)
        said = said._replace(exits=f"{layer} of {self.subject.depth} layers")
        return Contender(said, answer, lambda: None, self.first, None, layer)


def _answers(model: Model, batch: dict[str, Tensor]) -> Answer:
    out: Any = model(**batch)
    return out.logits, out.exit_layer
