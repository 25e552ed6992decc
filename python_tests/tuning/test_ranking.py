"""NDCG and MRR: worked examples, other implementations, ties, queries that do not count, and calibration by queries."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

import earlyexit_kernels as ee
from earlyexit_kernels.tuning.calibrate import split_indices
from earlyexit_kernels.tuning.metrics import score
from earlyexit_kernels.tuning.ranking import CUT, RANKING_METRICS, counted, mrr, ndcg
from earlyexit_kernels.tuning.rows import Rows

#: Discounts of the first three ranks.
FIRST, SECOND, THIRD = 1.0, 1 / math.log2(3), 0.5


def drawn(queries, seed=0, *, most=24, levels=4):
    """Scores with ties, graded relevance and queries of 1 to `most` documents, in mixed order."""
    generator = np.random.default_rng(seed)
    groups = np.repeat(np.arange(queries), generator.integers(1, most + 1, size=queries))
    groups = generator.permutation(groups)
    scores = generator.integers(0, 6, size=len(groups)).astype(np.float32)
    return scores, generator.integers(0, levels, size=len(groups)).clip(1) - 1.0, groups


@pytest.mark.parametrize(
    ("scores", "labels", "groups", "of_ndcg", "of_mrr"),
    [
        # the relevant document is second of three
        ([3.0, 2.0, 1.0], [0, 1, 0], "aaa", [SECOND], [1 / 2]),
        # graded: order 1, 0, 2 instead of 2, 1, 0
        ([3.0, 2.0, 1.0], [1, 0, 2], "aaa", [(1 + 2 * THIRD) / (2 + SECOND)], [1.0]),
        # two queries whose rows alternate; in b the relevant one is last
        ([2.0, 9.0, 1.0, 8.0], [1, 0, 0, 1], "abab", [FIRST, SECOND], [1.0, 1 / 2]),
        # c has one row, d has no relevant one: neither counts
        ([2.0, 1.0, 5.0, 1.0, 2.0], [0, 1, 1, 0, 0], "aacdd", [SECOND], [1 / 2]),
        # all equal: the mean over the orders
        ([1.0, 1.0, 1.0], [0, 1, 0], "aaa", [(FIRST + SECOND + THIRD) / 3], [(1 + 1 / 2 + 1 / 3) / 3]),
        # below one document, a tie of a relevant and another one
        ([2.0, 1.0, 1.0], [0, 1, 0], "aaa", [(SECOND + THIRD) / 2], [(1 / 2 + 1 / 3) / 2]),
    ],
)
def test_worked_examples(scores, labels, groups, of_ndcg, of_mrr):
    assert ndcg(scores, labels, list(groups)) == pytest.approx(of_ndcg)
    assert mrr(scores, labels, list(groups)) == pytest.approx(of_mrr)


def test_only_the_first_ten_documents_count():
    scores, labels = np.arange(12, 0, -1.0), np.zeros(12)
    labels[CUT - 1] = 1
    assert mrr(scores, labels, [0] * 12) == pytest.approx([1 / 10])
    assert ndcg(scores, labels, [0] * 12) == pytest.approx([1 / math.log2(11)])
    assert not mrr(scores, np.roll(labels, 1), [0] * 12).any() and not ndcg(scores, np.roll(labels, 1), [0] * 12).any()


def test_ndcg_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is in the extra 'tuning'")
    scores, labels, groups = drawn(60)
    expected = [
        metrics.ndcg_score([labels[groups == q]], [scores[groups == q]], k=CUT)
        for q in np.unique(groups[counted(labels, groups)])
    ]
    assert len(expected) > 40
    assert ndcg(scores, labels, groups) == pytest.approx(expected)


def test_mrr_of_ties_is_the_mean_over_their_orders():
    scores, labels, groups = drawn(40, most=6)

    def of_order(order):
        ranks = [rank for rank, row in enumerate(order, start=1) if labels[row] > 0]
        return 1 / ranks[0]

    expected = []
    for query in np.unique(groups[counted(labels, groups)]):
        rows = np.flatnonzero(groups == query)
        orders = [o for o in itertools.permutations(rows) if (np.diff(scores[list(o)]) <= 0).all()]
        expected.append(np.mean([of_order(order) for order in orders]))
    assert mrr(scores, labels, groups) == pytest.approx(expected)


@pytest.mark.parametrize("metric", RANKING_METRICS.values())
@pytest.mark.parametrize(
    ("scores", "labels", "groups", "words"),
    [
        ([1.0, 2.0], [1, 0], [0, 1], "of 2 queries 2 have one row, and 0 more have no relevant one"),
        ([1.0, 2.0, 3.0], [0, 0, 1], [0, 0, 1], "of 2 queries 1 have one row, and 1 more have no relevant one"),
        ([1.0, 2.0], [1, 0, 1], [0, 0, 0], "one shape"),
        ([], [], [], "one shape"),
        ([1.0, math.nan], [1, 0], [0, 0], "expected finite scores"),
        ([1.0, 2.0], [1, -1], [0, 0], "labels of at least 0"),
    ],
)
def test_refuses(metric, scores, labels, groups, words):
    with pytest.raises(ValueError, match=words):
        metric(scores, labels, groups)


def test_score_requires_groups_and_one_score_a_row():
    logits, labels = np.array([[2.0], [3.0], [1.0]]), [0, 0, 1]
    assert score(("mrr", "pearson"), logits, labels, groups=[0, 0, 0])["mrr"] == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match=r"mrr expects groups=.* got logits \[3, 1\] without groups"):
        score(("mrr",), logits, labels)
    with pytest.raises(ValueError, match=r"ndcg expects groups=.* got logits \[3, 2\] with groups"):
        score(("ndcg",), np.zeros((3, 2)), labels, groups=[0, 0, 0])


def ranked_trace(queries=120, documents=5, seed=0):
    """A trace of two exits, the first without information and the second noisy; relevance; queries."""
    generator = np.random.default_rng(seed)
    groups = np.repeat(np.arange(queries), documents)
    labels = np.tile([1.0] + [0.0] * (documents - 1), queries)
    noise = generator.normal(size=(len(groups), 2))
    logits = np.stack([noise[:, 0], labels + noise[:, 1] / 2], axis=1)
    return ee.ExitTrace(torch.from_numpy(logits[:, :, None]).float()), labels, groups


def test_a_random_exit_is_chance_and_a_good_one_is_not():
    trace, labels, groups = ranked_trace()
    rows = Rows(trace, labels, "ndcg", "regression", groups)
    assert rows.is_chance(1) and not rows.is_chance(2)


def test_errors_and_intervals_are_over_queries():
    trace, labels, groups = ranked_trace()
    rows = Rows(trace, labels, "ndcg", "regression", groups)
    full, first = rows.at_layer(2), rows.at_layer(1)
    values, of_first = ndcg(full, labels, groups), ndcg(first, labels, groups)
    assert rows.score(full) == pytest.approx(values.mean())
    # 120 queries in 20 groups of 6: the jackknife of a mean is near its standard error
    assert rows.score_error(full) == pytest.approx(values.std(ddof=1) / math.sqrt(120), rel=0.5)
    low, high = rows.drop_interval(first)
    drop, error = (values - of_first).mean(), (values - of_first).std(ddof=1) / math.sqrt(120)
    assert low == pytest.approx(drop - 1.96 * error, abs=error) and high == pytest.approx(
        drop + 1.96 * error, abs=error
    )
    part = rows.take(np.flatnonzero(groups < 60))
    assert part.score(part.full_depth) == pytest.approx(values[:60].mean())


def test_queries_stay_together_in_a_split():
    groups = np.random.default_rng(0).permutation(np.repeat(np.arange(30), 4))
    tuning, checked = split_indices(len(groups), groups=groups)
    assert sorted([*tuning, *checked]) == list(range(120)) and len(tuning) == len(checked) == 60
    assert not set(groups[tuning]) & set(groups[checked])
    assert (np.diff(tuning) > 0).all() and (np.diff(checked) > 0).all()


@pytest.mark.parametrize("metric", [None, "mrr"])
def test_calibrate_by_a_ranking(metric):
    trace, labels, groups = ranked_trace()
    tolerances = [ee.criteria.Patience(patience=1, tolerance=t) for t in (1e-3, 0.5, 1.0)]
    found = ee.calibrate(trace, labels, target=ee.MaxDrop(0.5), criterion=tolerances, groups=groups, metric=metric)
    assert found.metric == (metric or "ndcg") and found.untrained == (1,)
    assert found.rows == {"tuning": 300, "check": 300}
    assert ee.Calibration.from_dict(found.to_dict()) == found


def test_sweep_by_a_ranking():
    trace, labels, groups = ranked_trace()
    found = ee.sweep((trace, labels), (trace, labels), metrics=("ndcg", "mrr"), points=8, groups=(groups, groups))
    values = [RANKING_METRICS[name](trace.logits[:, 1, 0].numpy(), labels, groups).mean() for name in ("ndcg", "mrr")]
    assert list(found.layers["reporting"][1].values()) == pytest.approx(values)
    point = found.points["patience"][0]
    assert set(point.reporting.scores) == {"ndcg", "mrr"} and 0 < point.reporting.random_exit <= 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"groups": np.zeros(5)}, r"groups= of shape \[N\] for a model with one output, got \[5\]"),
        ({"groups": None, "metric": "ndcg"}, "got 'ndcg'; it ranks the rows of a query, which groups= names"),
        ({"groups": np.arange(600)}, "tuning rows: expected at least 25 queries with two or more rows"),
        ({"groups": np.repeat(np.arange(40), 15)}, "expected at least 25 queries .* got 20; of 20 queries"),
        ({"labels": -1.0}, "expected labels of at least 0"),
    ],
)
def test_calibrate_refuses(given, words):
    trace, labels, groups = ranked_trace()
    if "labels" in given:
        labels = np.where(labels == 0, given["labels"], labels)
    named = {"groups": given.get("groups", groups), "metric": given.get("metric")}
    with pytest.raises(ValueError, match=words):
        ee.calibrate(trace, labels, target=ee.MaxDrop(0.1), criterion="patience", **named)


def test_groups_of_classes_are_refused():
    trace = ee.ExitTrace(torch.zeros(60, 2, 2))
    with pytest.raises(ValueError, match="for a model with one output"):
        ee.calibrate(trace, np.arange(60) % 2, target=ee.MaxDrop(0.1), groups=np.arange(60) // 2)
