"""Properties of the rules on any logits: monotonicity, independence of the batch, and invalid input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.plain_traces import exit_layers, trace_of

import earlyexit_kernels as ee
from earlyexit_kernels.criteria import (
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
VALUES = hnp.arrays(np.float32, (ROWS, DEPTH, 1), elements=FINITE)
HALTING = hnp.arrays(np.float32, (ROWS, DEPTH), elements=st.floats(0.015625, 0.9375, width=32))
HOSTILE = hnp.arrays(
    np.float32,
    (ROWS, DEPTH, CLASSES),
    elements=st.one_of(FINITE, st.sampled_from([math.nan, math.inf, -math.inf, 3e38, -3e38, 0.0])),
)
SHARE = st.floats(0, 1)


def scalars(draw_halting) -> dict:
    """Return all scalars that rules read, from one array of numbers in (0, 1); the key of a row is its number."""
    cosine = draw_halting * 2 - 1
    return {
        "halting": draw_halting,
        "uncertainty": draw_halting,
        "cosine": cosine,
        "keys": np.arange(len(draw_halting)),
    }


def never_later(logits, eager, reluctant, numbers=None) -> None:
    given = {} if numbers is None else scalars(numbers)
    early, late = (exit_layers(logits, criterion, **given) for criterion in (eager, reluctant))
    assert all(a <= b for a, b in zip(early, late, strict=True))


@given(LOGITS, SHARE, SHARE)
def test_thresholds_are_monotone(logits, a, b):
    low, high = sorted((a, b))
    never_later(logits, Entropy(threshold=high), Entropy(threshold=low))
    never_later(logits, Entropy(threshold=high, normalized=True), Entropy(threshold=low, normalized=True))
    never_later(logits, MaxProbability(threshold=low), MaxProbability(threshold=high))
    never_later(logits, Margin(threshold=low), Margin(threshold=high))
    never_later(logits, Energy(threshold=high), Energy(threshold=low))
    for patience in (1, 2):
        for rule in (PatientConfidence, DivergencePatience):
            never_later(logits, rule(threshold=high, patience=patience), rule(threshold=low, patience=patience))


@given(LOGITS, HALTING, SHARE, SHARE)
def test_thresholds_of_scalars_are_monotone(logits, numbers, a, b):
    low, high = sorted((a, b))
    never_later(logits, QExit(q=low), QExit(q=high), numbers)
    never_later(logits, Learned(threshold=high), Learned(threshold=low), numbers)
    never_later(logits, HiddenCosine(threshold=low), HiddenCosine(threshold=high), numbers)
    never_later(logits, HiddenCosine(threshold=-high), HiddenCosine(threshold=-low), numbers)
    for bound in ("paper", "tight"):
        never_later(logits, Dact(bound=bound, epsilon=high), Dact(bound=bound, epsilon=low), numbers)
    never_later(logits, Dact(bound="tight", epsilon=low), Dact(epsilon=low), numbers)


@given(LOGITS, VALUES, st.integers(1, 6), st.integers(1, 6), st.floats(0.01, 4), st.floats(0.01, 4))
def test_patience_is_monotone(logits, values, a, b, x, y):
    low, high = sorted((a, b))
    near, far = sorted((x, y))
    never_later(logits, Patience(patience=low), Patience(patience=high))
    never_later(values, Patience(patience=low, tolerance=near), Patience(patience=high, tolerance=near))
    never_later(values, Patience(patience=low, tolerance=far), Patience(patience=low, tolerance=near))
    never_later(logits, PatientConfidence(threshold=0.8, patience=low), PatientConfidence(threshold=0.8, patience=high))
    never_later(
        logits, DivergencePatience(threshold=0.2, patience=low), DivergencePatience(threshold=0.2, patience=high)
    )


@given(LOGITS, st.floats(0, 6), st.floats(0, 6), SHARE, SHARE)
def test_votes_are_monotone(logits, a, b, x, y):
    low, high = sorted((a, b))
    slow, fast = sorted((x, y))
    never_later(logits, Voting(threshold=low, gamma=x), Voting(threshold=high, gamma=x))
    never_later(logits, Voting(threshold=a, gamma=slow), Voting(threshold=a, gamma=fast))


@given(LOGITS, HALTING)
def test_settings_that_never_leave_equal_full_depth(logits, halting):
    """Settings that never let a row leave give the answers of no criterion."""
    trace = trace_of(logits, **scalars(halting))
    for criterion in (
        None,
        FullDepth(),
        Entropy(threshold=0.0),
        Entropy(threshold=0.0, normalized=True),
        Patience(patience=DEPTH),
        QExit(q=1.0),
        Voting(threshold=DEPTH + 1, final="last"),
        Learned(threshold=0.0),
        PatientConfidence(threshold=0.0, patience=1),
        PatientConfidence(threshold=1.0, patience=DEPTH + 1),
        DivergencePatience(threshold=0.0, patience=1),
        DivergencePatience(threshold=1.0, patience=DEPTH),
        HiddenCosine(threshold=1.0),
        Energy(threshold=0.0),
    ):
        answers, exit_layer = ee.replay(trace, criterion)
        assert torch.equal(answers, trace.logits[:, -1]), criterion
        assert exit_layer.tolist() == [DEPTH] * ROWS


def first_with_meaning(logits) -> list[int]:
    """Return the first layer of each row with valid logits, or the last layer if there is none."""
    layers = []
    for row in logits:
        fine = [not np.isnan(z).any() and (z == np.inf).sum() < 2 and (z > -np.inf).any() for z in row]
        layers.append(fine.index(True) + 1 if any(fine) else DEPTH)
    return layers


@given(HOSTILE)
def test_rules_that_always_leave_wait_for_valid_logits(logits):
    numbers = scalars(np.full((ROWS, DEPTH), 0.5))
    for criterion in (
        Entropy(threshold=9.0),
        MaxProbability(threshold=0.0),
        Margin(threshold=0.0),
        QExit(q=0.0),
        Voting(threshold=0),
        Dact(epsilon=1.0),
        Learned(threshold=1.0),
        HiddenCosine(threshold=-1.0),
    ):
        assert exit_layers(logits, criterion, **numbers) == first_with_meaning(logits)


@given(HOSTILE, hnp.arrays(np.float32, (ROWS, DEPTH), elements=st.sampled_from([0.0, 0.1, 0.5, 1.0, math.nan])), SHARE)
def test_extreme_logits_do_not_raise(logits, halting, x):
    trace = trace_of(logits, **scalars(halting))
    for criterion in (
        Entropy(threshold=x),
        Margin(threshold=x),
        MaxProbability(threshold=x),
        QExit(q=x),
        Patience(patience=2),
        SampledExit(seed=3),
        Learned(threshold=x),
        PatientConfidence(threshold=x, patience=2),
        DivergencePatience(threshold=x, patience=1),
        HiddenCosine(threshold=x),
        Energy(threshold=x),
    ):
        answers, exit_layer = ee.replay(trace, criterion)
        assert all(1 <= layer <= DEPTH for layer in exit_layer.tolist())
        picked = trace.logits[torch.arange(ROWS), exit_layer - 1]
        assert torch.equal(answers.nan_to_num(0.5), picked.nan_to_num(0.5))
        assert torch.equal(answers.isnan(), picked.isnan())


@given(HOSTILE, hnp.arrays(np.float32, (ROWS, DEPTH), elements=st.sampled_from([0.0, 0.5, 1.0, math.nan])))
def test_extreme_logits_do_not_invalidate_combined_answers(logits, halting):
    """A row that leaves at valid logits gets a distribution, whatever the logits of previous layers are."""
    for criterion in (Expectation(), Voting(threshold=2), Dact(), Dact(bound="tight", epsilon=0.1)):
        answers, exit_layer = ee.replay(trace_of(logits, **scalars(halting)), criterion)
        for n, layer in enumerate(exit_layer.tolist()):
            z, aux = logits[n, layer - 1], halting[n, layer - 1]
            fine = not np.isnan(z).any() and (z == np.inf).sum() < 2 and (z > -np.inf).any()
            if fine and (criterion.needs is None or not np.isnan(aux)):
                assert answers[n].exp().sum().item() == pytest.approx(1.0, abs=1e-5) or criterion == Expectation()
                assert answers[n].isfinite().all()
            else:
                assert layer == DEPTH


@pytest.mark.parametrize("criterion", [QExit(q=0.5), SampledExit(seed=0), Dact(epsilon=0.5)], ids=str)
def test_invalid_halting_probability_keeps_the_row(backend, criterion):
    halting = [[math.nan, 0.9, 0.9], [0.9, 0.9, 0.9], [math.nan] * 3]
    if isinstance(criterion, SampledExit):
        halting = np.where(np.isnan(halting), math.nan, 1.0)
    got = exit_layers(torch.zeros(3, 3, 2), criterion, halting=halting, keys=[1, 2, 3], backend=backend)
    assert got == [2, 1, 3]


@given(HOSTILE, HALTING, st.permutations(range(ROWS)), SHARE)
def test_row_order_does_not_matter(logits, halting, order, x):
    trace = trace_of(logits, **scalars(halting))
    order = list(order)
    aux = {name: values[order] for name, values in trace.aux.items()}
    moved = ee.ExitTrace(trace.logits[order], aux, trace.keys[order])
    for criterion in (
        Entropy(threshold=x),
        Margin(threshold=x),
        QExit(q=x),
        Patience(patience=1),
        SampledExit(seed=2),
        Expectation(),
        Voting(threshold=2),
        Dact(bound="tight"),
        DivergencePatience(threshold=x, patience=1),
        Energy(threshold=x),
    ):
        for one, other in zip(ee.replay(trace, criterion), ee.replay(moved, criterion), strict=True):
            assert torch.equal(one[order].nan_to_num(0.5), other.nan_to_num(0.5)), criterion


@pytest.mark.parametrize(
    "rule",
    [Patience(patience=1, tolerance=0.1), Entropy(threshold=0.5), SampledExit(seed=0), Voting(threshold=1), Dact()],
    ids=str,
)
def test_no_rows(backend, rule):
    classes = 1 if "regression" in rule.tasks else 3
    none = np.zeros((0, 4))
    trace = trace_of(np.zeros((0, 4, classes)), halting=none, keys=np.zeros(0, dtype=np.int64))
    logits, exit_layer = ee.replay(trace, rule, backend=backend)
    assert logits.shape == (0, classes) and exit_layer.shape == (0,)
