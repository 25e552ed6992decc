"""What the rules decide: worked examples of their papers' formulae, and properties that hold for any logits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import earlyexit_kernels as ee
from earlyexit_kernels.criteria import Entropy, FullDepth, Margin, MaxProbability, Patience, QExit

ROWS, DEPTH, CLASSES = 3, 5, 3


def exit_layers(logits, criterion, *, halting=None, backend="auto") -> list[int]:
    """Exit layers of logits ``[N, L, C]``; `halting` are probabilities ``[N, L]``."""
    aux = {} if halting is None else {"halting": torch.logit(torch.as_tensor(halting, dtype=torch.float32))}
    trace = ee.ExitTrace(torch.as_tensor(np.asarray(logits), dtype=torch.float32), aux)
    return ee.replay(trace, criterion, backend=backend)[1].tolist()


def labelled(labels, classes=2) -> torch.Tensor:
    """Logits ``[1, L, C]`` whose exits answer these labels."""
    return torch.nn.functional.one_hot(torch.tensor([labels]), classes).float()


@pytest.mark.parametrize(("q", "layer"), [(0.5, 3), (0.27, 2), (0.75, 4), (0.0, 1), (1.0, 4), (0.09, 1), (0.63, 3)])
def test_q_exit_of_four_halting_probabilities(backend, q, layer):
    """lambda = .1 .2 .5 .3 has the cdf .1 .28 .64 .748."""
    logits = torch.arange(8.0).reshape(1, 4, 2)
    assert exit_layers(logits, QExit(q=q), halting=[[0.1, 0.2, 0.5, 0.3]], backend=backend) == [layer]


def test_q_exit_is_strict_but_for_zero(backend):
    """A cdf of exactly q stays; q = 0 leaves at layer 1 even where nothing halts."""
    logits = torch.zeros(1, 3, 2)
    assert exit_layers(logits, QExit(q=0.5), halting=[[0.5, 0.5, 0.5]], backend=backend) == [2]
    assert exit_layers(logits, QExit(q=0.0), halting=[[0.0, 0.0, 0.0]], backend=backend) == [1]
    assert exit_layers(logits, QExit(q=1.0), halting=[[1.0, 1.0, 1.0]], backend=backend) == [3]


@pytest.mark.parametrize(("labels", "patience", "layer"), [
    ([0, 1, 1, 1, 0], 1, 3),
    ([0, 1, 1, 1, 0], 2, 4),
    ([0, 1, 1, 1, 0], 3, 5),
    ([0, 1, 0, 0], 1, 4),
    ([1, 1, 1], 1, 2),
])  # fmt: skip
def test_patience_over_labels(backend, labels, patience, layer):
    assert exit_layers(labelled(labels), Patience(patience=patience), backend=backend) == [layer]


def test_patience_compares_a_value_with_the_one_right_before_it(backend):
    """A slow drift passes; the step of exactly the tolerance doesn't."""
    values = torch.tensor([[0.0, 1.0, 1.5, 2.0, 2.25], [0.0, 0.25, 0.5, 9.0, 9.0], [0.0, 0.5, 1.0, 1.5, 2.0]])
    assert exit_layers(values[..., None], Patience(patience=2, tolerance=0.5), backend=backend) == [5, 3, 5]
    assert exit_layers(values[..., None], Patience(patience=1, tolerance=0.51), backend=backend) == [3, 2, 2]


@pytest.mark.parametrize(("below", "above"), [
    (Entropy(threshold=0.32508), Entropy(threshold=0.32509)),
    (Entropy(threshold=0.46899, normalized=True), Entropy(threshold=0.46901, normalized=True)),
    (MaxProbability(threshold=0.90001), MaxProbability(threshold=0.89999)),
    (Margin(threshold=0.80001), Margin(threshold=0.79999)),
], ids=str)  # fmt: skip
def test_scores_of_nine_to_one(backend, below, above):
    """p = (.9, .1): entropy .325083 nats, .468996 of log 2, largest probability .9, margin .8."""
    logits = torch.tensor([[[0.9, 0.1], [0.5, 0.5]]]).log()
    assert exit_layers(logits, below, backend=backend) == [2]
    assert exit_layers(logits, above, backend=backend) == [1]


def test_entropy_is_strict_and_probabilities_are_not(backend):
    """Two equal logits: p = 1/2 and a margin of 0, without rounding; one finite logit: an entropy of 0."""
    even = torch.zeros(1, 2, 2)
    assert exit_layers(even, MaxProbability(threshold=0.5), backend=backend) == [1]
    assert exit_layers(even, Margin(threshold=0.0), backend=backend) == [1]
    sure = torch.tensor([[[5.0, -math.inf]] * 2])
    assert exit_layers(sure, Entropy(threshold=0.0), backend=backend) == [2]
    assert exit_layers(sure, MaxProbability(threshold=1.0), backend=backend) == [1]
    assert exit_layers(sure, Margin(threshold=1.0), backend=backend) == [1]


def test_one_infinite_logit_dominates(backend):
    logits = torch.tensor([[[1.0, math.inf, 3.0]] * 2])
    for criterion in (Entropy(threshold=1e-6), MaxProbability(threshold=1.0), Margin(threshold=1.0)):
        assert exit_layers(logits, criterion, backend=backend) == [1]


@pytest.mark.parametrize("classes", [2, 3, 17])
def test_ties_go_to_the_lowest_class(backend, classes):
    """After a tie of classes a < b, the label a continues it and b doesn't; signs of zero make no difference."""
    for a, b in [(0, 1), (0, classes - 1), (classes - 2, classes - 1)]:
        tie = torch.full((classes,), -1.0)
        tie[a], tie[b] = -0.0, 0.0
        low, high = torch.eye(classes)[a], torch.eye(classes)[b]
        logits = torch.stack(
            [torch.stack([tie, low, low]), torch.stack([tie, high, high]), torch.stack([low, tie, low])]
        )
        assert exit_layers(logits, Patience(patience=1), backend=backend) == [2, 3, 2]


def test_thresholds_by_exit(backend):
    logits = torch.tensor([[[0.0, 1.0]] * 4])
    assert exit_layers(logits, MaxProbability(threshold=[0.99, 0.7, 0.99]), backend=backend) == [2]
    assert exit_layers(logits, MaxProbability(threshold=[0.99, 0.99, 0.99]), backend=backend) == [4]


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


def never_later(logits, eager, reluctant, halting=None) -> None:
    early, late = (exit_layers(logits, criterion, halting=halting) for criterion in (eager, reluctant))
    assert all(a <= b for a, b in zip(early, late, strict=True))


@given(LOGITS, SHARE, SHARE)
def test_thresholds_are_monotone(logits, a, b):
    low, high = sorted((a, b))
    never_later(logits, Entropy(threshold=high), Entropy(threshold=low))
    never_later(logits, Entropy(threshold=high, normalized=True), Entropy(threshold=low, normalized=True))
    never_later(logits, MaxProbability(threshold=low), MaxProbability(threshold=high))
    never_later(logits, Margin(threshold=low), Margin(threshold=high))


@given(LOGITS, HALTING, SHARE, SHARE)
def test_q_is_monotone(logits, halting, a, b):
    low, high = sorted((a, b))
    never_later(logits, QExit(q=low), QExit(q=high), halting)


@given(LOGITS, VALUES, st.integers(1, 6), st.integers(1, 6), st.floats(0.01, 4), st.floats(0.01, 4))
def test_patience_is_monotone(logits, values, a, b, x, y):
    low, high = sorted((a, b))
    near, far = sorted((x, y))
    never_later(logits, Patience(patience=low), Patience(patience=high))
    never_later(values, Patience(patience=low, tolerance=near), Patience(patience=high, tolerance=near))
    never_later(values, Patience(patience=low, tolerance=far), Patience(patience=low, tolerance=near))


@given(LOGITS, HALTING)
def test_never_is_full_depth(logits, halting):
    """The settings that never trigger answer with the last exit, as no criterion at all does."""
    trace = ee.ExitTrace(torch.from_numpy(logits), {"halting": torch.logit(torch.from_numpy(halting))})
    for criterion in (
        None,
        FullDepth(),
        Entropy(threshold=0.0),
        Entropy(threshold=0.0, normalized=True),
        Patience(patience=DEPTH),
        QExit(q=1.0),
    ):
        answers, exit_layer = ee.replay(trace, criterion)
        assert torch.equal(answers, trace.logits[:, -1])
        assert exit_layer.tolist() == [DEPTH] * ROWS


def first_with_meaning(logits) -> list[int]:
    """The first layer of each row whose logits have a softmax; the last one if there is none."""
    layers = []
    for row in logits:
        fine = [not np.isnan(z).any() and (z == np.inf).sum() < 2 and (z > -np.inf).any() for z in row]
        layers.append(fine.index(True) + 1 if any(fine) else DEPTH)
    return layers


@given(HOSTILE)
def test_rules_that_always_trigger_wait_for_logits_with_a_meaning(logits):
    halting = np.full((ROWS, DEPTH), 0.5)
    for criterion in (Entropy(threshold=9.0), MaxProbability(threshold=0.0), Margin(threshold=0.0), QExit(q=0.0)):
        assert exit_layers(logits, criterion, halting=halting) == first_with_meaning(logits)


@given(HOSTILE, hnp.arrays(np.float32, (ROWS, DEPTH), elements=st.sampled_from([0.1, 0.5, math.nan])), SHARE)
def test_hostile_numbers_never_crash(logits, halting, x):
    trace = ee.ExitTrace(torch.from_numpy(logits), {"halting": torch.from_numpy(halting)})
    for criterion in (
        Entropy(threshold=x),
        Margin(threshold=x),
        MaxProbability(threshold=x),
        QExit(q=x),
        Patience(patience=2),
    ):
        answers, exit_layer = ee.replay(trace, criterion)
        assert all(1 <= layer <= DEPTH for layer in exit_layer.tolist())
        picked = trace.logits[torch.arange(ROWS), exit_layer - 1]
        assert torch.equal(answers.nan_to_num(0.5), picked.nan_to_num(0.5))
        assert torch.equal(answers.isnan(), picked.isnan())


def test_a_halting_probability_without_meaning_waits(backend):
    halting = [[math.nan, 0.9, 0.9], [0.9, 0.9, 0.9], [math.nan] * 3]
    assert exit_layers(torch.zeros(3, 3, 2), QExit(q=0.5), halting=halting, backend=backend) == [2, 1, 3]


@given(HOSTILE, HALTING, st.permutations(range(ROWS)), SHARE)
def test_the_order_of_rows_does_not_matter(logits, halting, order, x):
    trace = ee.ExitTrace(torch.from_numpy(logits), {"halting": torch.from_numpy(halting)})
    moved = ee.ExitTrace(trace.logits[list(order)], {"halting": trace.aux["halting"][list(order)]})
    for criterion in (Entropy(threshold=x), Margin(threshold=x), QExit(q=x), Patience(patience=1)):
        for one, other in zip(ee.replay(trace, criterion), ee.replay(moved, criterion), strict=True):
            assert torch.equal(one[list(order)].nan_to_num(0.5), other.nan_to_num(0.5))


@pytest.mark.parametrize("classes", [1, 3])
def test_no_rows(backend, classes):
    rule = Patience(patience=1, tolerance=0.1) if classes == 1 else Entropy(threshold=0.5)
    logits, exit_layer = ee.replay(ee.ExitTrace(torch.zeros(0, 4, classes)), rule, backend=backend)
    assert logits.shape == (0, classes) and exit_layer.shape == (0,)
