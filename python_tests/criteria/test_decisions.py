"""Decisions of the rules: worked examples of the formulas in their papers."""

from __future__ import annotations

import math

import pytest
import torch
from support.plain_traces import exit_layers, labelled, logits_of

from earlyexit_kernels.criteria import (
    DivergencePatience,
    Energy,
    Entropy,
    HiddenCosine,
    Learned,
    Margin,
    MaxProbability,
    Patience,
    PatientConfidence,
    QExit,
    Voting,
)


@pytest.mark.parametrize(("q", "layer"), [(0.5, 3), (0.27, 2), (0.75, 4), (0.0, 1), (1.0, 4), (0.09, 1), (0.63, 3)])
def test_q_exit_quantiles(backend, q, layer):
    """lambda = .1 .2 .5 .3 has the cdf .1 .28 .64 .748."""
    logits = torch.arange(8.0).reshape(1, 4, 2)
    assert exit_layers(logits, QExit(q=q), halting=[[0.1, 0.2, 0.5, 0.3]], backend=backend) == [layer]


def test_q_exit_is_strict_except_for_zero(backend):
    """A row with a cdf of exactly q stays; with q = 0 it leaves at layer 1 even if all halting probabilities are 0."""
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


def test_patience_compares_a_value_with_the_previous_one(backend):
    """A slow drift counts as agreement; a step of exactly the tolerance does not."""
    values = torch.tensor([[0.0, 1.0, 1.5, 2.0, 2.25], [0.0, 0.25, 0.5, 9.0, 9.0], [0.0, 0.5, 1.0, 1.5, 2.0]])
    assert exit_layers(values[..., None], Patience(patience=2, tolerance=0.5), backend=backend) == [5, 3, 5]
    assert exit_layers(values[..., None], Patience(patience=1, tolerance=0.51), backend=backend) == [3, 2, 2]


def with_entropy(share) -> float:
    """Return the larger of two probabilities whose entropy is this share of log 2, by bisection."""
    low, high = 0.5, 1.0
    for _ in range(60):
        p = (low + high) / 2
        low, high = (p, high) if -(p * math.log(p) + (1 - p) * math.log(1 - p)) > share * math.log(2) else (low, p)
    return low


@pytest.mark.parametrize(("patience", "layer"), [(1, 1), (2, 4), (3, 4)])
def test_patient_confidence_counts_consecutive_exits(backend, patience, layer):
    """Shares .3 .6 .2 .1 of log 2 with threshold .5: one confident exit at layer 1, two consecutive ones at layer 4."""
    logits = logits_of(*[(p, 1 - p) for p in map(with_entropy, (0.3, 0.6, 0.2, 0.1))])
    assert exit_layers(logits, PatientConfidence(threshold=0.5, patience=patience), backend=backend) == [layer]


def test_patient_confidence_does_not_compare_labels(backend):
    logits = logits_of((0.99, 0.01), (0.01, 0.99), (0.5, 0.5))
    assert exit_layers(logits, PatientConfidence(threshold=0.5, patience=2), backend=backend) == [2]
    assert exit_layers(logits, PatientConfidence(threshold=[0.1, 0.01], patience=1), backend=backend) == [1]


def test_divergence_of_two_distributions(backend):
    """JS((.6, .4), (.9, .1)) = (.6 log .8 + .4 log 1.6 + .9 log 1.2 + .1 log .4) / 2 = .0632878 nats."""
    logits = logits_of((0.6, 0.4), (0.9, 0.1), (0.5, 0.5))
    divergence = (0.6 * math.log(0.8) + 0.4 * math.log(1.6) + 0.9 * math.log(1.2) + 0.1 * math.log(0.4)) / 2
    assert divergence == pytest.approx(0.0632878, abs=1e-7)
    for threshold, layer in ((divergence + 1e-5, 2), (divergence - 1e-5, 3)):
        rule = DivergencePatience(threshold=threshold, patience=1)
        assert exit_layers(logits, rule, backend=backend) == [layer]


def test_divergence_patience_counts_from_the_second_exit(backend):
    """Equal exits agree at any threshold above 0; the first has no previous exit, and a jump resets the count."""
    still = labelled([0, 0, 0, 0, 0])
    jump = labelled([0, 0, 1, 1, 1])
    for patience in (1, 2, 3):
        rule = DivergencePatience(threshold=1e-6, patience=patience)
        assert exit_layers(still, rule, backend=backend) == [patience + 1]
        assert exit_layers(jump, rule, backend=backend) == [{1: 2, 2: 5, 3: 5}[patience]]
    assert exit_layers(still, DivergencePatience(threshold=0.0, patience=1), backend=backend) == [5]
    sure = torch.tensor([[[5.0, -math.inf]] * 3])
    assert exit_layers(sure, DivergencePatience(threshold=0.1, patience=1), backend=backend) == [2]


def test_learned_exit_is_strict(backend):
    uncertainty = [[0.5, 0.25, 0.1, 0.0]]
    logits = torch.zeros(1, 4, 2)
    for threshold, layer in ((0.5, 2), (0.51, 1), (0.1, 4), (0.0, 4), ([0.5, 0.2, 0.11], 3)):
        rule = Learned(threshold=threshold)
        assert exit_layers(logits, rule, uncertainty=uncertainty, backend=backend) == [layer]


def test_hidden_cosine_is_not_strict(backend):
    cosine = [[-0.5, 0.25, 0.75, 1.0]]
    for threshold, layer in ((-1.0, 1), (-0.5, 1), (0.25, 2), (0.5, 3), (1.0, 4), ([0.0, 0.3, 0.7], 3)):
        rule = HiddenCosine(threshold=threshold)
        assert exit_layers(torch.zeros(1, 4, 1), rule, cosine=cosine, backend=backend) == [layer]


def test_energy_depends_on_the_scale_of_the_logits(backend):
    """sum exp = 3 gives 1 / 4, 12 gives 1 / 13: equal softmax, different energy. Strict; an infinite logit gives 0."""
    logits = torch.tensor([[[1.0, 2.0], [4.0, 8.0], [2.0, 4.0]]]).log()
    for threshold, layer in ((0.2501, 1), (0.2499, 2), (0.0768, 3), (0.0, 3)):
        assert exit_layers(logits, Energy(threshold=threshold), backend=backend) == [layer]
    assert exit_layers(torch.zeros(1, 2, 3), Energy(threshold=0.25), backend=backend) == [2]
    assert exit_layers(torch.zeros(1, 2, 3), Energy(threshold=0.2501), backend=backend) == [1]
    huge = torch.tensor([[[3e38, -3e38]] * 2, [[-3e38, -3.1e38]] * 2])
    assert exit_layers(huge, Energy(threshold=1e-30), backend=backend) == [1, 2]


@pytest.mark.parametrize(("below", "above"), [
    (Entropy(threshold=0.32508), Entropy(threshold=0.32509)),
    (Entropy(threshold=0.46899, normalized=True), Entropy(threshold=0.46901, normalized=True)),
    (MaxProbability(threshold=0.90001), MaxProbability(threshold=0.89999)),
    (Margin(threshold=0.80001), Margin(threshold=0.79999)),
], ids=str)  # fmt: skip
def test_scores_of_probabilities_nine_to_one(backend, below, above):
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


def test_one_infinite_logit_leaves_at_layer_1(backend):
    logits = torch.tensor([[[1.0, math.inf, 3.0]] * 2])
    for criterion in (
        Entropy(threshold=1e-6),
        MaxProbability(threshold=1.0),
        Margin(threshold=1.0),
        PatientConfidence(threshold=1e-6, patience=1),
        Energy(threshold=1e-6),
        Voting(threshold=1),
    ):
        assert exit_layers(logits, criterion, backend=backend) == [1]


@pytest.mark.parametrize("classes", [2, 3, 17])
def test_ties_go_to_the_lowest_class(backend, classes):
    """After a tie of classes a < b, the label a agrees and b does not; the sign of zero does not matter."""
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
