"""Properties of the rules on any logits: monotonicity, independence of the batch, and invalid input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.criterion_cases import CASES
from support.plain_traces import exit_layers, trace_of

import earlyexit_kernels as ee
from earlyexit_kernels.criteria import (
    RULES,
    Dact,
    DivergencePatience,
    Energy,
    Entropy,
    Expectation,
    FullDepth,
    HiddenCosine,
    Learned,
    Margin,
    MaxProbability,
    Patience,
    PatientConfidence,
    QExit,
    SampledExit,
    Voting,
)

ROWS, DEPTH, CLASSES = 3, 5, 3
FINITE = st.floats(-8, 8, width=32)
LOGITS = hnp.arrays(np.float32, (ROWS, DEPTH, CLASSES), elements=FINITE)
HALTING = hnp.arrays(np.float32, (ROWS, DEPTH), elements=st.floats(0.015625, 0.9375, width=32))
HOSTILE = hnp.arrays(
    np.float32,
    (ROWS, DEPTH, CLASSES),
    elements=st.one_of(FINITE, st.sampled_from([math.nan, math.inf, -math.inf, 3e38, -3e38, 0.0])),
)
HOSTILE_HALTING = hnp.arrays(np.float32, (ROWS, DEPTH), elements=st.sampled_from([0.0, 0.1, 0.5, 1.0, math.nan]))
SHARE = st.floats(0, 1)

#: Rule with a number from 0 to 1, of which a larger one lets no row leave earlier.
BY_SHARE = {
    "entropy": lambda x: Entropy(threshold=1 - x),
    "entropy normalized": lambda x: Entropy(threshold=1 - x, normalized=True),
    "max probability": lambda x: MaxProbability(threshold=x),
    "margin": lambda x: Margin(threshold=x),
    "energy": lambda x: Energy(threshold=1 - x),
    "patient confidence": lambda x: PatientConfidence(threshold=1 - x, patience=1),
    "patient confidence 2": lambda x: PatientConfidence(threshold=1 - x, patience=2),
    "divergence": lambda x: DivergencePatience(threshold=1 - x, patience=1),
    "divergence 2": lambda x: DivergencePatience(threshold=1 - x, patience=2),
    "q": lambda x: QExit(q=x),
    "learned": lambda x: Learned(threshold=1 - x),
    "cosine": lambda x: HiddenCosine(threshold=2 * x - 1),
    "dact": lambda x: Dact(epsilon=1 - x),
    "dact tight": lambda x: Dact(bound="tight", epsilon=1 - x),
    "votes": lambda x: Voting(threshold=6 * x, gamma=0.3),
    "votes by depth": lambda x: Voting(threshold=1.5, gamma=x),
}
#: The same with a whole number from 1 on.
BY_COUNT = {
    "patience": lambda n: Patience(patience=n),
    "patient confidence": lambda n: PatientConfidence(threshold=0.8, patience=n),
    "divergence": lambda n: DivergencePatience(threshold=0.2, patience=n),
}


def scalars(halting) -> dict:
    """Return all scalars that rules read, from one array of numbers in (0, 1); the key of a row is its number."""
    return {"halting": halting, "uncertainty": halting, "cosine": halting * 2 - 1, "keys": np.arange(len(halting))}


def never_later(logits, eager, reluctant, halting) -> None:
    early, late = (exit_layers(logits, criterion, **scalars(halting)) for criterion in (eager, reluctant))
    assert all(a <= b for a, b in zip(early, late, strict=True)), (eager, reluctant)


@given(LOGITS, HALTING, SHARE, SHARE)
def test_thresholds_are_monotone(logits, halting, a, b):
    low, high = sorted((a, b))
    for build in BY_SHARE.values():
        never_later(logits, build(low), build(high), halting)
    never_later(logits, Dact(bound="tight", epsilon=low), Dact(epsilon=low), halting)
    values = logits[..., :1]
    eager, reluctant = (Patience(patience=2, tolerance=4.01 - 4 * x) for x in (low, high))
    never_later(values, eager, reluctant, halting)


@given(LOGITS, HALTING, st.integers(1, 6), st.integers(1, 6))
def test_patience_is_monotone(logits, halting, a, b):
    low, high = sorted((a, b))
    for build in BY_COUNT.values():
        never_later(logits, build(low), build(high), halting)
    eager, reluctant = (Patience(patience=n, tolerance=1.5) for n in (low, high))
    never_later(logits[..., :1], eager, reluctant, halting)


@given(LOGITS, HALTING)
def test_settings_that_never_leave_equal_full_depth(logits, halting):
    trace = trace_of(logits, **scalars(halting))
    unreached = [build(1.0) for name, build in BY_SHARE.items() if name in NEVER]
    unreached += [build(DEPTH + 1) for build in BY_COUNT.values()]
    for criterion in (None, FullDepth(), Voting(threshold=DEPTH + 1, final="last"), *unreached):
        answers, exit_layer = ee.replay(trace, criterion)
        assert torch.equal(answers, trace.logits[:, -1]), criterion
        assert exit_layer.tolist() == [DEPTH] * ROWS


#: Rules of `BY_SHARE` by which no row leaves at 1, and that let every valid row leave at 0.
NEVER = ("entropy", "entropy normalized", "energy", "patient confidence", "divergence", "q", "learned", "cosine")
ALWAYS = ("max probability", "margin", "q", "learned", "cosine", "dact", "dact tight", "votes")


def has_meaning(z) -> bool:
    """Return whether the logits of a row at one exit are valid."""
    return not np.isnan(z).any() and (z == np.inf).sum() < 2 and (z > -np.inf).any()


@given(HOSTILE)
def test_rules_that_always_leave_wait_for_valid_logits(logits):
    expected = [next((k for k, z in enumerate(row, start=1) if has_meaning(z)), DEPTH) for row in logits]
    numbers = scalars(np.full((ROWS, DEPTH), 0.5))
    for criterion in (Entropy(threshold=9.0), *(BY_SHARE[name](0.0) for name in ALWAYS)):
        assert exit_layers(logits, criterion, **numbers) == expected, criterion


@given(HOSTILE, HOSTILE_HALTING, SHARE)
def test_extreme_logits_neither_raise_nor_invalidate_answers(logits, halting, x):
    """The answer is that of the exit, or of a rule with answers of its own a distribution where the exit is valid."""
    trace = trace_of(logits, **scalars(halting))
    rules = [Patience(patience=2), SampledExit(seed=3), Expectation(), *(build(x) for build in BY_SHARE.values())]
    for criterion in rules:
        answers, exit_layer = ee.replay(trace, criterion)
        for n, layer in enumerate(exit_layer.tolist()):
            z, aux = trace.logits[n, layer - 1], halting[n, layer - 1]
            valid = has_meaning(z.numpy()) and (criterion.needs is None or not np.isnan(aux))
            assert layer == DEPTH or valid
            if not CASES[criterion.name].own_answer:
                assert torch.equal(answers[n].nan_to_num(0.5), z.nan_to_num(0.5))
            elif valid:
                assert answers[n].isfinite().all()
                total = answers[n].exp().sum().item()
                assert total == pytest.approx(1.0, abs=1e-5) or isinstance(criterion, Expectation)


@pytest.mark.parametrize("criterion", [QExit(q=0.5), SampledExit(seed=0), Dact(epsilon=0.5)], ids=str)
def test_invalid_halting_probability_keeps_the_row(backend, criterion):
    halting = [[math.nan, 0.9, 0.9], [0.9, 0.9, 0.9], [math.nan] * 3]
    if isinstance(criterion, SampledExit):
        halting = np.where(np.isnan(halting), math.nan, 1.0)
    got = exit_layers(torch.zeros(3, 3, 2), criterion, halting=halting, keys=[1, 2, 3], backend=backend)
    assert got == [2, 1, 3]


def settings() -> list:
    """Every setting of the tests of the ops that fits three classes and any depth."""
    named = {name: setting for rule in RULES for name, setting in CASES[rule].settings.items()}
    return [setting.build(3) for name, setting in named.items() if 3 in setting.classes and "by_layer" not in name]


@given(HOSTILE, HALTING, st.permutations(range(ROWS)))
def test_row_order_does_not_matter(logits, halting, order):
    trace = trace_of(logits, **scalars(halting))
    order = list(order)
    aux = {name: values[order] for name, values in trace.aux.items()}
    moved = ee.ExitTrace(trace.logits[order], aux, trace.keys[order])
    for criterion in settings():
        for one, other in zip(ee.replay(trace, criterion), ee.replay(moved, criterion), strict=True):
            assert torch.equal(one[order].nan_to_num(0.5), other.nan_to_num(0.5)), criterion


def test_no_rows(backend):
    none = np.zeros((0, 4))
    trace = trace_of(np.zeros((0, 4, 3)), halting=none, uncertainty=none, cosine=none, keys=none[:, 0].astype(np.int64))
    for criterion in settings():
        logits, exit_layer = ee.replay(trace, criterion, backend=backend)
        assert logits.shape == (0, 3) and exit_layer.shape == (0,), criterion
