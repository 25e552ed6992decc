"""Decisions of the rules on every back-end: worked examples of the formulas in their papers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.plain_traces import exit_layers, labelled, logits_of
from torch import Tensor

from earlyexit_kernels.criteria import (
    Criterion,
    DivergencePatience,
    Energy,
    Entropy,
    FixedLayer,
    HiddenCosine,
    Learned,
    Margin,
    MaxProbability,
    Patience,
    PatientConfidence,
    QExit,
    Voting,
)


def with_entropy(share) -> float:
    """Return the larger of two probabilities whose entropy is this share of log 2, by bisection."""
    low, high = 0.5, 1.0
    for _ in range(60):
        p = (low + high) / 2
        low, high = (p, high) if -(p * math.log(p) + (1 - p) * math.log(1 - p)) > share * math.log(2) else (low, p)
    return low


def by(cls, field, layers: dict, **others) -> dict[Criterion, Layers]:
    """Return the exit layers by value of one field of a criterion."""
    return {cls(**{field: value}, **others): k for value, k in layers.items()}


#: Exit layer of the only row, or those of all rows.
Layers = int | list[int]
#: Jensen-Shannon divergence of (.6, .4) and (.9, .1) in nats.
DIVERGENCE = (0.6 * math.log(0.8) + 0.4 * math.log(1.6) + 0.9 * math.log(1.2) + 0.1 * math.log(0.4)) / 2
TOLERANCE = [[0.0, 1.0, 1.5, 2.0, 2.25], [0.0, 0.25, 0.5, 9.0, 9.0], [0.0, 0.5, 1.0, 1.5, 2.0]]

#: What is shown -> logits [N, L, C], exit layers by criterion, and the scalars of the head.
EXAMPLES: dict[str, tuple[Tensor, dict[Criterion, Layers], dict[str, Any]]] = {
    "cdf .1 .28 .64 .748": (
        torch.arange(8.0).reshape(1, 4, 2),
        by(QExit, "q", {0.5: 3, 0.27: 2, 0.75: 4, 0.0: 1, 1.0: 4, 0.09: 1, 0.63: 3}),
        {"halting": [[0.1, 0.2, 0.5, 0.3]]},
    ),
    "a cdf of exactly q stays": (torch.zeros(1, 3, 2), {QExit(q=0.5): 2}, {"halting": [[0.5] * 3]}),
    "q of 0 always leaves": (torch.zeros(1, 3, 2), {QExit(q=0.0): 1}, {"halting": [[0.0] * 3]}),
    "q of 1 never leaves": (torch.zeros(1, 3, 2), {QExit(q=1.0): 3}, {"halting": [[1.0] * 3]}),
    "every valid row leaves at a fixed layer, an invalid one at the next": (
        torch.tensor([[[0.0, 0.0]] * 3, [[math.nan] * 2, [0.0, 0.0], [0.0, 0.0]]]),
        by(FixedLayer, "layer", {1: [1, 2], 2: [2, 2], 3: [3, 3], 9: [3, 3]}),
        {},
    ),
    "patience": (labelled([0, 1, 1, 1, 0]), by(Patience, "patience", {1: 3, 2: 4, 3: 5}), {}),
    "patience at the last layer": (labelled([0, 1, 0, 0]), {Patience(patience=1): 4}, {}),
    "patience at once": (labelled([1, 1, 1]), {Patience(patience=1): 2}, {}),
    "a slow drift agrees, a step of exactly the tolerance does not": (
        torch.tensor(TOLERANCE)[..., None],
        {Patience(patience=2, tolerance=0.5): [5, 3, 5], Patience(patience=1, tolerance=0.51): [3, 2, 2]},
        {},
    ),
    "entropy .3 .6 .2 .1 of log 2": (
        logits_of(*[(p, 1 - p) for p in map(with_entropy, (0.3, 0.6, 0.2, 0.1))]),
        by(PatientConfidence, "patience", {1: 1, 2: 4, 3: 4}, threshold=0.5),
        {},
    ),
    "patient confidence does not compare labels": (
        logits_of((0.99, 0.01), (0.01, 0.99), (0.5, 0.5)),
        {PatientConfidence(threshold=0.5, patience=2): 2, PatientConfidence(threshold=(0.1, 0.01), patience=1): 1},
        {},
    ),
    "divergence of two distributions": (
        logits_of((0.6, 0.4), (0.9, 0.1), (0.5, 0.5)),
        by(DivergencePatience, "threshold", {DIVERGENCE + 1e-5: 2, DIVERGENCE - 1e-5: 3}, patience=1),
        {},
    ),
    "equal exits agree, the first of which has none before it": (
        labelled([0, 0, 0, 0, 0]),
        by(DivergencePatience, "patience", {1: 2, 2: 3, 3: 4}, threshold=1e-6)
        | {DivergencePatience(threshold=0.0, patience=1): 5},
        {},
    ),
    "a jump resets the count": (
        labelled([0, 0, 1, 1, 1]),
        by(DivergencePatience, "patience", {1: 2, 2: 5, 3: 5}, threshold=1e-6),
        {},
    ),
    "uncertainty is strict": (
        torch.zeros(1, 4, 2),
        by(Learned, "threshold", {0.5: 2, 0.51: 1, 0.1: 4, 0.0: 4, (0.5, 0.2, 0.11): 3}),
        {"uncertainty": [[0.5, 0.25, 0.1, 0.0]]},
    ),
    "cosine is not strict": (
        torch.zeros(1, 4, 1),
        by(HiddenCosine, "threshold", {-1.0: 1, -0.5: 1, 0.25: 2, 0.5: 3, 1.0: 4, (0.0, 0.3, 0.7): 3}),
        {"cosine": [[-0.5, 0.25, 0.75, 1.0]]},
    ),
    # equal softmax, different energy
    "energy 1/4 1/13": (
        torch.tensor([[[1.0, 2.0], [4.0, 8.0], [2.0, 4.0]]]).log(),
        by(Energy, "threshold", {0.2501: 1, 0.2499: 2, 0.0768: 3, 0.0: 3}),
        {},
    ),
    "energy is strict": (torch.zeros(1, 2, 3), by(Energy, "threshold", {0.25: 2, 0.2501: 1}), {}),
    "energy of huge logits": (
        torch.tensor([[[3e38, -3e38]] * 2, [[-3e38, -3.1e38]] * 2]),
        {Energy(threshold=1e-30): [1, 2]},
        {},
    ),
    # entropy .325083 nats, .468996 of log 2, largest probability .9, margin .8
    "probabilities nine to one": (
        torch.tensor([[[0.9, 0.1], [0.5, 0.5]]]).log(),
        by(Entropy, "threshold", {0.32508: 2, 0.32509: 1})
        | by(Entropy, "threshold", {0.46899: 2, 0.46901: 1}, normalized=True)
        | by(MaxProbability, "threshold", {0.90001: 2, 0.89999: 1})
        | by(Margin, "threshold", {0.80001: 2, 0.79999: 1}),
        {},
    ),
    # without rounding: p = 1/2 and a margin of 0
    "probabilities are not strict": (
        torch.zeros(1, 2, 2),
        {MaxProbability(threshold=0.5): 1, Margin(threshold=0.0): 1, Margin(threshold=1e-6): 2},
        {},
    ),
    "entropy is strict": (
        torch.tensor([[[5.0, -math.inf]] * 3]),
        by(Entropy, "threshold", {0.0: 3})
        | {MaxProbability(threshold=1.0): 1, Margin(threshold=1.0): 1}
        | {DivergencePatience(threshold=0.1, patience=1): 2},
        {},
    ),
    "thresholds by exit": (
        torch.tensor([[[0.0, 1.0]] * 4]),
        by(MaxProbability, "threshold", {(0.99, 0.7, 0.99): 2, (0.99, 0.99, 0.99): 4}),
        {},
    ),
    "votes": (labelled([0, 1, 0, 0]), by(Voting, "threshold", {1: 1, 2: 3, 3: 4, 4: 4}), {}),
    # shares 1, 1/2, 2/3, 3/4, 4/5; over the root of the depth: 1, .71, 1.15, 1.5, 1.79
    "votes by depth": (
        labelled([0, 1, 0, 0, 0]),
        {Voting(threshold=1.0, gamma=1.0): 1} | by(Voting, "threshold", {1.1: 3, 1.2: 4, 1.6: 5, 9: 5}, gamma=0.5),
        {},
    ),
}


def test_the_divergence_of_the_example():
    assert pytest.approx(0.0632878, abs=1e-7) == DIVERGENCE


@pytest.mark.parametrize("name", EXAMPLES)
def test_rows_leave_as_computed_by_hand(backend, name):
    logits, expected, scalars = EXAMPLES[name]
    for rule, layers in expected.items():
        layers = layers if isinstance(layers, list) else [layers]
        assert exit_layers(logits, rule, backend=backend, **scalars) == layers, rule


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
