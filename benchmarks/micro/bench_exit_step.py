"""`exit_step` under entropy and patience: from ready logits, and with the pooled linear exit fused.

    python -m pytest benchmarks/micro/bench_exit_step.py --benchmark-only -k "entropy and logits"

Other criteria are timed by the suite ``decision_cost``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest

from benchmarks.harness import Checked, Implementation, Variant
from benchmarks.machine import device
from benchmarks.micro.decisions import LAYER, Decision, head_giving, middle_settings, random_trace
from benchmarks.micro.plain import STEPS, PlainDecision
from benchmarks.micro.shapes import BASE, CALLS, EAGER, NAMES, Shape, around, repeated
from earlyexit_kernels.criteria import Criterion, Patience

#: Rows of the trace that settings are chosen on, so that they are the same for every batch.
SETTING_ROWS = 256


@dataclass(frozen=True)
class Case:
    """One criterion on one input; `source` is a name of `plain.SOURCES`."""

    rule: str
    source: str
    shape: Shape

    def __str__(self) -> str:
        return f"{self.rule}-{self.source}-{self.shape}"


CASES = [
    *(Case(rule, "logits", shape) for rule in STEPS for shape in around("rows", "classes")),
    *(Case("patience", pooling, BASE) for pooling in ("first", "mean")),
    *(Case("entropy", pooling, shape) for pooling in ("first", "mean") for shape in around("rows", "classes", "width")),
]


@functools.cache
def rules(classes: int) -> dict[str, Criterion]:
    """Return settings under which some of the rows leave at the middle layer."""
    entropy = middle_settings(random_trace(SETTING_ROWS, classes))["entropy"]
    return {"entropy": entropy, "patience": Patience(patience=LAYER - 2)}


@functools.lru_cache(maxsize=1)
def variants_of(case: Case) -> dict[str, Implementation]:
    """Return the variants of a case; they are timed one after the other, so those of one case are kept."""
    shape, rule = case.shape, rules(case.shape.classes)[case.rule]
    trace = random_trace(shape.rows, shape.classes, device())
    exits = [trace.logits[:, k].contiguous() for k in range(trace.depth)]
    head, inputs = None, (exits[LAYER - 1],)
    if case.source != "logits":
        head = head_giving(exits[LAYER - 1], shape.width, shape.length, case.source)
        inputs = (head.hidden.view(shape.rows, shape.length, shape.width), head.weight, head.bias)
    plain = PlainDecision(rule, exits, case.source, inputs)

    def fused(backend: str) -> Implementation:
        found = Decision(rule, trace, backend, CALLS[device()], head)

        def check() -> Checked:
            found.restore()
            live = int(found()[0])
            row_ids, _, answers, _ = found.copies[-1]
            return plain.check(row_ids < 0, live, answers)

        return Implementation(Variant(backend), found, check, found.restore)

    eager = repeated(EAGER, plain, Checked)
    return {name: eager if name == EAGER else fused(name) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_exit_step(timed, case, name):
    timed(variants_of(case)[name])
