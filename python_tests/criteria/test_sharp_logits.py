"""Extreme logits and almost equal exits: decisions compared with high-precision references."""

from __future__ import annotations

import decimal
import math
from decimal import Decimal

import pytest
import torch
from support.exit_step_cases import one_exit

from earlyexit_kernels import criteria

LARGEST = torch.finfo(torch.float32).max
#: One +inf, whose class has all the probability, beside numbers up to the largest.
SHARP = torch.tensor(
    [
        [math.inf, LARGEST, 0.0],
        [LARGEST, math.inf, LARGEST],
        [0.0, -LARGEST, math.inf],
        [-math.inf, LARGEST, math.inf],
    ]
)


@pytest.mark.parametrize(
    "criterion",
    [
        criteria.MaxProbability(threshold=1.0),
        criteria.Margin(threshold=1.0),
        criteria.Entropy(threshold=1e-30),
        criteria.PatientConfidence(threshold=1e-30, patience=1),
        criteria.Energy(threshold=1e-30),
        criteria.Voting(threshold=1),
        criteria.Dact(bound="tight"),
    ],
    ids=lambda criterion: criterion.name,
)
def test_one_infinite_logit_has_probability_1(backend, criterion):
    rows = one_exit(criterion, SHARP, backend, aux=torch.ones(len(SHARP)) if criterion.needs else None)
    assert rows["exit_layer"].tolist() == [1] * len(SHARP)


def test_expectation_of_an_infinite_logit(backend):
    rows = one_exit(criteria.Expectation(), SHARP, backend, depth=1, aux=torch.ones(len(SHARP)))
    assert rows["answers"].softmax(dim=-1).round(decimals=6).tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]]


def test_an_infinite_output_without_weight_does_not_count(backend):
    """The expected output of a regression; 0 times infinity is not a number."""
    rows = one_exit(criteria.Expectation(), torch.tensor([[math.inf]]), backend, aux=torch.zeros(1))
    assert rows["state"].tolist() == [[1.0], [0.0]]


def test_divergence_of_equal_infinite_logits_is_zero(backend):
    rule = criteria.DivergencePatience(threshold=1e-30, patience=1)
    finite = 180 * torch.eye(3)[[0, 1, 2, 2]] - 90
    rows = one_exit(rule, SHARP, backend)
    assert rows["exit_layer"].tolist() == [-9] * 4
    rows = one_exit(rule, finite, backend, layer=2, depth=3, state=rows["state"])
    assert rows["exit_layer"].tolist() == [2] * 4


def divergence(p, q) -> Decimal:
    """Return the Jensen-Shannon divergence in nats from its definition, with 60 digits, of float32 `p` and `q`."""
    with decimal.localcontext() as context:
        context.prec = 60
        total = Decimal(0)
        for a, b in zip(map(Decimal, p), map(Decimal, q), strict=True):
            for one in (a, b):
                total += one * (2 * one / (a + b)).ln() if one else 0
        return total / 2


@pytest.mark.parametrize("apart", [1.0, 0.6, 0.3, 0.1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
@pytest.mark.parametrize("classes", [2, 3, 17])
def test_small_divergences_are_accurate(backend, apart, classes):
    """The decision changes within 1e-4 of the true divergence, or within the error that rounding of p allows."""
    generator, rows = torch.Generator().manual_seed(classes), 1 if backend == "triton" else 6
    z = torch.randn(rows, classes, generator=generator)
    rule = criteria.DivergencePatience(threshold=1.0, patience=9)
    before = one_exit(rule, z, backend)["state"]
    near = z + apart * torch.randn(rows, classes, generator=generator)
    after = one_exit(rule, near, backend, layer=2, depth=3, state=before.clone())["state"]
    for row in range(len(z)):
        true = float(divergence(after[1:, row].tolist(), before[1:, row].tolist()))
        for share, close in ((1 - 1e-4, False), (1 + 1e-4, True)):
            rule = criteria.DivergencePatience(threshold=min(true * share, 1.0), patience=9)
            state = before[:, row : row + 1].clone()
            one_exit(rule, near[row : row + 1], backend, layer=2, depth=3, state=state)
            assert bool(state[0, 0]) == close, (row, true, share)


def test_divergence_of_disjoint_exits_is_log_2(backend):
    """It is log 2, the maximum."""
    z = torch.tensor([[200.0, -200.0]])
    for threshold, close in ((math.log(2) - 1e-6, False), (math.log(2) + 1e-6, True)):
        rule = criteria.DivergencePatience(threshold=threshold, patience=9)
        state = one_exit(rule, z, backend)["state"]
        assert bool(one_exit(rule, -z, backend, layer=2, depth=3, state=state)["state"][0, 0]) == close
