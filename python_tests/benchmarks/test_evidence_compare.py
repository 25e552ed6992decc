"""Rules compared at the cost of the reported rows: mixes, random exits, errors, and multiply-adds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import earlyexit_kernels as ee
from benchmarks.evidence.compare import Comparison, upper_hull, weighted_scores
from benchmarks.evidence.kept import Costs, Kept, packed_logits
from earlyexit_kernels import criteria
from earlyexit_kernels.tuning.metrics import METRICS

DEPTH, CLASSES = 4, 3
RULES = ("entropy", "patience", "voting", "q_exit", "dact", "fixed_layer", "sampled_exit", "expectation")


def invented(rows=300, metric="accuracy", classes=CLASSES, **arrays) -> Kept:
    """Return answers of a model whose later exits are more often right."""
    torch.manual_seed(0)
    found = {}
    for split in ("tuning", "reporting"):
        labels = torch.randint(classes, (rows,))
        logits = torch.randn(rows, DEPTH, classes)
        logits += F.one_hot(labels, classes)[:, None] * torch.linspace(0.5, 3, DEPTH)[:, None]
        halting = torch.rand(rows, DEPTH)
        found[f"{split}_logits"] = packed_logits(logits, "single_label_classification")
        found[f"{split}_halting"] = halting.half().numpy()
        found[f"{split}_labels"] = labels.numpy().astype(np.uint8)
        found[f"{split}_tokens"] = torch.randint(4, 60, (rows,)).numpy().astype(np.uint16)
    exits = {"": (50.0, 0.0, 0.0), "halting": (70.0, 0.0, 0.0)}
    costs = Costs((0.0, 5.0, 0.0), (0.0, 100.0, 2.0), (10.0, 1.0, 0.0), exits)
    words = ("toy", metric, "single_label_classification", {}, "q_exit", "")
    return Kept(*words, costs, {}, {}, {}, {}, found | arrays)


@pytest.fixture(scope="module")
def compared() -> Comparison:
    return Comparison(invented())


@pytest.mark.parametrize("rule", RULES)
def test_outcomes_are_those_of_a_replay_at_their_cost(rule, compared):
    kept, split = compared.kept, "reporting"
    tokens, trace = kept.tokens(split).astype(float), kept.trace(split)
    layer = 100 * tokens + 2 * tokens**2
    full = (5 * tokens + DEPTH * layer).mean()
    outcomes = compared.outcomes(rule, split)
    assert len(outcomes) == len(compared.settings(rule)) > 0
    for outcome in outcomes[:6]:
        logits, layers = ee.replay(trace, outcome.criterion)
        assert np.array_equal(outcome.answers, logits.argmax(-1)) and np.array_equal(outcome.exit_layer, layers)
        each = 70 if outcome.criterion.needs else 50
        exits = np.ones(len(tokens)) if rule == "fixed_layer" else layers.numpy()
        expected = (5 * tokens + layers.numpy() * layer + exits * each) / full
        np.testing.assert_allclose(outcome.macs, expected)


@pytest.mark.parametrize("share", [0.4, 0.5, 2 / 3, 0.9])
@pytest.mark.parametrize("rule", ["entropy", "fixed_layer", "q_exit"])
def test_a_mix_meets_the_share_on_the_reported_rows_and_reads_no_label_of_theirs(rule, share, compared):
    mix = compared.mix(rule, share)
    assert mix.macs == pytest.approx(share) and 0 <= mix.weight <= 1
    others = invented()
    others.arrays["reporting_labels"][:] = 0
    again = Comparison(others).mix(rule, share)
    assert again.weight == mix.weight and again.first.criterion == mix.first.criterion
    assert compared.mix(rule, 0.1) is None and compared.mix(rule, 1.5) is None
    assert compared.mix("patience", 0.4) is None, "two exits have to agree first"


def test_the_hull_holds_the_best_mix_of_every_share():
    rng = np.random.default_rng(0)
    for _ in range(50):
        points = [(float(a), float(b)) for a, b in rng.random((7, 2))]
        hull = [points[n] for n in upper_hull(points)]
        costs = [c for c, _ in points]
        share = float(rng.uniform(min(costs), max(costs)))
        best = max(
            (s * (d - share) + t * (share - c)) / (d - c)
            for (c, s), (d, t) in itertools.permutations(points, 2)
            if c <= share <= d
        )
        assert np.interp(share, [c for c, _ in hull], [s for _, s in hull]) == pytest.approx(best)


@pytest.mark.parametrize("metric", ["accuracy", "matthews", "pearson"])
def test_weighted_scores_are_those_of_repeated_rows(metric):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 40) if metric != "pearson" else rng.random(40)
    answers = np.where(rng.random(40) < 0.7, labels, rng.permutation(labels))
    weights = rng.integers(0, 4, (5, 40))
    expected = [METRICS[metric](np.repeat(answers, each), np.repeat(labels, each)) for each in weights]
    np.testing.assert_allclose(weighted_scores(metric, answers, labels, weights), expected, atol=1e-6)


def test_answers_at_each_layer_are_those_of_the_rule(compared):
    """A row that leaves at a layer is answered as there."""
    for rule in ("voting", "dact", "entropy", "patience"):
        left = 0
        for outcome in compared.outcomes(rule, "reporting"):
            at = compared.at_layers("reporting", outcome.criterion)
            early = outcome.exit_layer < DEPTH
            rows = np.arange(len(early))[early]
            left += len(rows)
            assert np.array_equal(at[outcome.exit_layer[rows] - 1, rows], outcome.answers[rows])
        assert left > 300
    plain, mixed = compared.at_layers("reporting"), compared.at_layers("reporting", criteria.Dact())
    assert np.array_equal(plain, compared.kept.trace("reporting").logits.argmax(-1).T) and (plain[1] != mixed[1]).any()


def test_random_exits_keep_the_mix_and_lose_what_the_rule_knows(compared):
    mix = compared.mix("entropy", 0.6)
    accuracies = (compared.at_layers("reporting") == compared.kept.labels("reporting")).mean(axis=1)
    expected = 0.0
    for outcome, weight in ((mix.first, mix.weight), (mix.second, 1 - mix.weight)):
        shares = np.bincount(outcome.exit_layer, minlength=DEPTH + 1)[1:] / len(outcome.exit_layer)
        expected += weight * shares @ accuracies
    assert compared.random(mix) == pytest.approx(expected, abs=0.01)
    assert compared.mixed_score(mix) > compared.random(mix) + 0.02


def test_differences_are_paired(compared):
    entropy, fixed = compared.mix("entropy", 0.6), compared.mix("fixed_layer", 0.6)
    apart, low, high = compared.difference(entropy, fixed)
    assert low < apart < high and apart == compared.mixed_score(entropy) - compared.mixed_score(fixed)
    assert compared.difference(entropy, entropy) == (0.0, 0.0, 0.0)
    one = np.sqrt(compared.mixed_score(entropy) * (1 - compared.mixed_score(entropy)) / 300)
    assert (high - low) / 3.92 < 1.42 * one, "rows that both answer alike do not count"


def test_the_lossless_setting_is_chosen_on_the_tuning_rows(compared):
    found = compared.lossless("entropy")
    full = compared.score(compared.at_layers("tuning")[-1], "tuning")
    number = compared.settings("entropy").index(found.criterion)
    tuning = compared.outcomes("entropy", "tuning")
    assert compared.score(tuning[number].answers, "tuning") >= full
    assert all(
        o.macs.mean() >= tuning[number].macs.mean() for o in tuning if compared.score(o.answers, "tuning") >= full
    )
