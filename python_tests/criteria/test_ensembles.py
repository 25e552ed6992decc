"""Rules that combine several exits: voting, DACT, and the sampled and expected exit distribution."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from support import oracle
from support.backends import backend_params
from support.plain_traces import exit_layers, labelled, trace_of

import earlyexit_kernels as ee
from earlyexit_kernels.criteria import Dact, Expectation, SampledExit, Voting

HALTING = [[0.1, 0.2, 0.5, 0.3]]
#: The exit distribution of HALTING; the last layer has the remaining probability.
EXITS = np.array([0.1, 0.18, 0.36, 0.36])


def replayed(trace, criterion, backend="auto") -> tuple[np.ndarray, list[int]]:
    """Return the probabilities ``[N, C]`` of the answers, and the exit layers."""
    answers, exit_layer = ee.replay(trace, criterion, backend=backend)
    return answers.double().softmax(dim=1).numpy(), exit_layer.tolist()


@pytest.mark.parametrize(("labels", "winner"), [
    ([0, 1], 1), ([1, 0], 0), ([0, 1, 1, 0], 0), ([2, 1, 0, 0, 1, 2], 2), ([2, 2, 1, 0, 1], 1), ([1, 2, 0], 0),
])  # fmt: skip
def test_voting_ties_go_to_the_most_recent_vote(backend, labels, winner):
    answer, exit_layer = replayed(trace_of(labelled(labels, 3)), Voting(threshold=9), backend)
    assert exit_layer == [len(labels)] and answer.argmax(axis=1).tolist() == [winner]


def test_voting_threshold_ignores_rounding():
    """In floating point 0.07 * 100 and 0.55 * 100 are slightly above 7 and 55."""
    assert 0.07 * 100 > 7 and 0.55 * 100 > 55
    assert [Voting(threshold=share, gamma=1.0).params(100)[0] for share in (0.07, 0.55, 0.551)] == [7, 55, 56]
    assert Voting(threshold=1e300).params(3)[0] == 4096


def test_voting_can_answer_with_the_last_exit(backend):
    logits = labelled([1, 1, 0]) * 3 - 1
    answers, exit_layer = ee.replay(trace_of(logits), Voting(threshold=4, final="last"), backend=backend)
    assert torch.equal(answers, logits[:, 2]) and exit_layer.tolist() == [3]
    early, exit_layer = replayed(trace_of(logits), Voting(threshold=2, final="last"), backend)
    assert early[0].tolist() == pytest.approx([1 / 4.5, 3.5 / 4.5]) and exit_layer == [2]


def test_voting_is_exact_at_the_maximum_depth():
    """4095 layers that vote alternately: 2048 votes for class 0, which also has the last vote."""
    labels = [layer % 2 for layer in range(4095)]
    answer, exit_layer = replayed(trace_of(labelled(labels)), Voting(threshold=2048))
    assert exit_layer == [4095] and answer[0].tolist() == pytest.approx([2049.5 / 4097.5, 2048 / 4097.5], abs=1e-7)


DACT_LOGITS = torch.tensor([[[0.6, 0.4], [0.7, 0.3], [0.2, 0.8], [0.9, 0.1]]]).log()
DACT_HALTING = [[0.7, 0.5, 0.5, 0.5]]


P = np.array([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5], [0.7, 0.3]])
#: The answer of DACT_LOGITS up to each layer.
MIXED = {1: [0.6, 0.4], 2: [0.63, 0.37]}
#: What is shown -> a trace, criteria, and by each the exit layers of the rows and the probabilities of their answers.
ANSWERS = {
    "votes 3 1 0, smoothed 4.5 2 1 of 7.5": (
        trace_of(labelled([0, 1, 0, 0], 3)), [Voting(threshold=3)], [4], [[4.5 / 7.5, 2 / 7.5, 1 / 7.5]],
    ),
    "h = .3 .5 .5 .5: .5230875 > .5095 at layer 3": (
        trace_of(DACT_LOGITS, halting=DACT_HALTING), [Dact(), Dact(bound="tight")], [3], [[0.5655, 0.4345]],
    ),
    **{
        f"h = .3 .5 up to layer {k}": (
            trace_of(DACT_LOGITS[:, :k], halting=np.array(DACT_HALTING)[:, :k]), [Dact()], [k], [MIXED[k]],
        )
        for k in MIXED
    },
    "with p = 0 later layers have no weight, and a row stays only if classes tie": (
        trace_of([[[3.0, 1.0]] + [[0.0, 5.0]] * 2, [[1.0, 1.0]] + [[0.0, 5.0]] * 2], halting=[[1.0, 0.5, 0.5]] * 2),
        [Dact(), Dact(bound="tight")], [1, 3], [[1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2))], [0.5, 0.5]],
    ),
    "all exits weighted": (trace_of(np.log(P)[None], halting=HALTING), [Expectation()], [4], [(EXITS @ P).tolist()]),
    "a probability of 0 has a finite logarithm": (
        trace_of([[[0.0, -math.inf], [200.0, 0.0]]], halting=[[0.5, 0.5]]), [Expectation()], [2], [[1.0, 0.0]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_are_those_computed_by_hand(backend, name):
    trace, rules, layers, probabilities = ANSWERS[name]
    for rule in rules:
        answers, exit_layer = ee.replay(trace, rule, backend=backend)
        assert exit_layer.tolist() == layers and answers.isfinite().all()
        np.testing.assert_allclose(answers.exp().numpy(), probabilities, rtol=0, atol=1e-6)


def test_dact_epsilon(backend):
    """p = .3 .15 .075: below epsilon at layers 1, 2, 3; bounds .2058 < 1.3 and .455175 < .67 fail before layer 3."""
    trace = trace_of(DACT_LOGITS, halting=DACT_HALTING)
    for epsilon, layer in ((0.31, 1), (0.29, 2), (0.16, 2), (0.14, 3), (1.0, 1)):
        assert replayed(trace, Dact(epsilon=epsilon), backend)[1] == [layer]


def hard_traces(rows, depth, classes, g) -> tuple[np.ndarray, np.ndarray]:
    """Return logits ``[N, L, C]`` of many scales and halting probabilities ``[N, L]``, some of them exactly 0 or 1.

    In a third of the rows all exits from a random layer on predict one class with certainty and do not halt.
    """
    logits = g.normal(size=(rows, depth, classes)) * 10.0 ** g.uniform(-2, 1.5, size=(rows, 1, 1))
    sure = g.uniform(size=(rows, 1)) ** g.choice([0.2, 1.0, 5.0], size=(rows, 1))
    halting = np.where(g.uniform(size=(rows, depth)) < 0.5, sure, g.uniform(size=(rows, depth)))
    ends = g.uniform(size=(rows, depth))
    halting = np.where(ends < 0.03, 0.0, np.where(ends > 0.97, 1.0, halting))
    start = np.where(g.uniform(size=rows) < 0.33, g.integers(1, depth + 1, size=rows), depth)
    late = np.arange(depth)[None] >= start[:, None]
    target = np.eye(classes)[g.integers(classes, size=rows)] * 40
    logits = np.where(late[..., None], target[:, None], logits)
    return logits.astype(np.float32), np.where(late, 0.0, halting).astype(np.float32)


def full_depth_answer(logits, halting) -> np.ndarray:
    """Return a_L ``[N, C]`` in float64."""
    z = logits.astype(np.float64)
    y = np.exp(z - z.max(axis=2, keepdims=True))
    y /= y.sum(axis=2, keepdims=True)
    a, p = np.zeros(y[:, 0].shape), np.ones(len(y))
    for layer in range(z.shape[1]):
        a = y[:, layer] * p[:, None] + a * (1 - p[:, None])
        p = p * (1 - halting[:, layer].astype(np.float64))
    return a


@pytest.mark.parametrize("backend", backend_params(["torch", "cpp"]))
def test_dact_never_changes_a_label(backend):
    """In 20,000 traces the label of a row equals that of full depth, and the tight bound never leaves later."""
    g = np.random.default_rng(7)
    shapes = list(itertools.product((2, 3, 5), range(1, 13)))
    early = {"paper": 0, "tight": 0}
    for classes, depth in shapes:
        logits, halting = hard_traces(-(-20_000 // len(shapes)), depth, classes, g)
        full = full_depth_answer(logits, halting)
        second, top = np.sort(full, axis=1)[:, -2:].T
        layers = {}
        for bound in early:
            trace = trace_of(logits, halting=halting)
            answers, exit_layer = ee.replay(trace, Dact(bound=bound), backend=backend)
            left = layers[bound] = exit_layer.numpy()
            # two classes within rounding at layer L may change places there, but no row left before
            sure = (left < depth) | (top - second > 1e-6)
            assert (answers.argmax(dim=1).numpy() == full.argmax(axis=1))[sure].all()
            assert np.abs(answers.exp().sum(dim=1).numpy() - 1).max() < 1e-5
            early[bound] += (left < depth).sum()
        assert (layers["tight"] <= layers["paper"]).all()
    assert 5_000 < early["paper"] < early["tight"], "the traces should let many rows leave early"


def test_expectation_of_values(backend):
    values = np.array([[[1.0], [-2.0], [4.0], [0.5]]])
    answers, _ = ee.replay(trace_of(values, halting=HALTING), Expectation(), backend=backend)
    assert answers.item() == pytest.approx(0.1 - 0.36 + 1.44 + 0.18, abs=1e-6)


def draws(seed, keys, halting=HALTING, backend="auto") -> np.ndarray:
    rows = len(keys)
    logits = np.zeros((rows, len(halting[0]), 2))
    return np.array(exit_layers(logits, SampledExit(seed=seed), halting=halting * rows, keys=keys, backend=backend))


KEYS = {
    "consecutive": lambda n: np.arange(n),
    "negative": lambda n: -np.arange(n) - 1,
    "high bits": lambda n: np.arange(n) << 40,
    "hashes": lambda n: np.random.default_rng(0).integers(-(2**63), 2**63 - 1, size=n),
}


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("seed", [0, 1, 42, 2**63 - 1])
def test_sampled_exits_follow_the_exit_distribution(keys, seed):
    """Pearson's chi-square with 3 degrees of freedom exceeds 21.1 once in 10,000 times."""
    rows = 20_000
    seen = np.bincount(draws(seed, KEYS[keys](rows)), minlength=5)[1:]
    wanted = EXITS * rows
    assert ((seen - wanted) ** 2 / wanted).sum() < 21.1


def test_sampled_exit_does_not_depend_on_the_batch(backend):
    keys = KEYS["hashes"](24)
    together = draws(3, keys, backend=backend)
    assert len(set(together.tolist())) > 2
    order = np.random.default_rng(1).permutation(24)
    assert (draws(3, keys[order], backend=backend) == together[order]).all()
    assert [draws(3, keys[i : i + 1], backend=backend)[0] for i in range(6)] == together[:6].tolist()


def test_sampled_exit_depends_on_the_seed():
    keys = np.arange(5000)
    first, second = draws(0, keys), draws(1, keys)
    agree = (first == second).mean()
    assert agree == pytest.approx(sum(p * p for p in EXITS), abs=0.03)


def uniforms(seeds, keys) -> np.ndarray:
    device = torch.device("cpu")
    keys = torch.as_tensor(keys)
    return np.stack([SampledExit(seed=s).new_state(len(keys), device, 2, keys)[1].double().numpy() for s in seeds])


def test_uniform_numbers_are_splitmix64():
    keys = [0, 1, -1, 2**63 - 1, -(2**63), 123456789]
    for seed in (0, 1, 2**62 + 5):
        assert uniforms([seed], keys)[0].tolist() == [oracle.uniform(seed, key) for key in keys]


def test_uniform_numbers_of_consecutive_keys_and_seeds_are_independent():
    """64 bins over 64 seeds and 1024 keys, in total, by rows and by columns; neighbours are uncorrelated."""
    u = uniforms(range(64), np.arange(1024))
    assert u.min() >= 0 and u.max() < 1
    for numbers in (u, u[:1], u[7:8], u[:, :16], u[:, 512:528]):
        seen = np.bincount((numbers.ravel() * 64).astype(int), minlength=64)
        wanted = numbers.size / 64
        assert ((seen - wanted) ** 2 / wanted).sum() < 121, "63 degrees of freedom: passed once in 100,000 times"
    for one, other in ((u[:, :-1], u[:, 1:]), (u[:-1], u[1:])):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.02


def test_sampled_exit_requires_keys():
    trace = trace_of(np.zeros((2, 4, 2)), halting=HALTING * 2)
    with pytest.raises(ValueError, match=r"'sampled_exit'.*got keys=None; use a trace of model.trace"):
        ee.replay(trace, SampledExit(seed=0))
    for keys, got in ((torch.zeros(3).long(), r"\[3\] torch.int64"), (torch.zeros(2), r"\[2\] torch.float32")):
        with pytest.raises(ValueError, match=r"'sampled_exit': expected keys \[2\] int64, got " + got):
            ee.replay(ee.ExitTrace(trace.logits, trace.aux, keys), SampledExit(seed=0))
