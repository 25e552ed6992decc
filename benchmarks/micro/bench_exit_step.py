"""`exit_step`, rule by rule: from ready logits, and with the pooled linear exit fused.

    python -m pytest benchmarks/micro/bench_exit_step.py --benchmark-only -k "entropy and logits"

Every rule runs at the base point, and from ready logits at the other numbers of rows and classes; the fused exit, whose
cost hangs little on the rule, runs at the other points with entropy.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
from torch import Tensor

from benchmarks.micro import measure
from benchmarks.micro.decisions import LAYER, Decision, head_giving, middle_settings, on_device, random_trace
from benchmarks.micro.measure import BASE, COMPILED, COPY, EAGER, Group, Shape, Way, around, repeated
from benchmarks.micro.plain_exits import LINEAR, PlainExit, Reference, given_by, ready
from benchmarks.micro.plain_rules import STEPS
from earlyexit_kernels.criteria import Criterion

SOURCES = ("logits", "first", "mean")
#: Rows of the trace that the settings are laid out over, so that they are the same for every batch.
SETTING_ROWS = 256


@dataclass(frozen=True)
class Case:
    """One rule on one input.

    Attributes:
        source: ``"logits"``, or how the fused exit pools.
    """

    rule: str
    source: str
    shape: Shape

    def __str__(self) -> str:
        return f"{self.rule}-{self.source}-{self.shape.slug}"

    @property
    def is_compiled(self) -> bool:
        """Compiling takes seconds a shape."""
        return self.rule == "entropy" and self.shape == BASE


CASES = [
    *(Case(rule, "logits", shape) for rule in STEPS for shape in around("rows", "classes")),
    *(Case(rule, pooling, BASE) for rule in STEPS for pooling in SOURCES[1:]),
    *(Case("entropy", pooling, shape) for pooling in SOURCES[1:] for shape in around("rows", "classes", "width")[1:]),
]


@functools.cache
def _settings(classes: int) -> dict[str, Criterion]:
    return middle_settings(random_trace(SETTING_ROWS, classes))


@functools.lru_cache(maxsize=1)
def group_of(case: Case) -> Group:
    """The ways of one case; they are timed one after the other, so one group is kept."""
    shape, rule = case.shape, _settings(case.shape.classes)[case.rule]
    trace = on_device(random_trace(shape.rows, shape.classes), measure.DEVICE)
    given = given_by(rule, trace)
    logits, aux = given[LAYER - 1]
    inputs: tuple[Tensor, ...] = ()
    head, source, middle = None, ready, None
    if case.source != "logits":
        head, source = head_giving(logits, shape.width, shape.length, case.source), LINEAR[case.source]
        padded = head.hidden.view(shape.rows, shape.length, shape.width)
        inputs = (padded, head.weight, head.bias, *(() if aux is None else (aux,)))
        middle = source(*(x.double() for x in inputs))
    reference = Reference(rule, given, trace.keys, middle)
    one = Decision(rule, trace, "torch", 1, head)
    moved = one.moved_bytes()
    calls = measure.calls_for(moved)

    def fused(backend: str) -> Way:
        decision = Decision(rule, trace, backend, calls, head)
        return Way(decision, lambda: reference.difference(decision.outcome()), decision.restore)

    def plain(compiles: bool) -> Way:
        chain = PlainExit(rule, given, trace.keys, source, inputs, compiles=compiles)
        return Way(repeated(chain.decide, calls), lambda: reference.difference(chain.outcome()))

    ways = {backend: fused(backend) for backend in measure.TIMED}
    ways |= {EAGER: plain(False), COPY: measure.copying(moved, calls)}
    if case.is_compiled:
        ways[COMPILED] = plain(True)
    facts = {"rule": rule.to_dict(), "source": case.source, "left": one.left}
    return Group("exit_step", f"{case.rule}, {case.source}", shape, moved, calls, ways, facts)


@pytest.mark.parametrize(
    ("case", "way"),
    [
        pytest.param(case, way, id=f"{case}-{way}")
        for case in CASES
        for way in measure.ways_of(*([COMPILED] if case.is_compiled else []))
    ],
)
def test_exit_step(timed, case, way):
    timed(group_of(case), way)
