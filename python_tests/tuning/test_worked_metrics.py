"""Metrics against examples computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from earlyexit_kernels.tuning import metrics


@pytest.mark.parametrize(
    ("name", "predictions", "labels", "value"),
    [
        ("accuracy", [0, 1, 2, 2], [0, 1, 1, 2], 0.75),
        # TP 2, TN 1, FP 1, FN 0: (2 * 1 - 0) / sqrt(3 * 2 * 2 * 1)
        ("matthews", [1, 1, 1, 0], [1, 1, 0, 0], 2 / np.sqrt(12)),
        ("matthews", [1, 1], [1, 0], 0.0),
        # precision 2/3, recall 1
        ("f1", [1, 1, 1, 0], [1, 1, 0, 0], 0.8),
        ("f1", [0, 0], [0, 0], 0.0),
        ("pearson", [1.0, 2.0, 3.0], [2.0, 4.0, 6.0], 1.0),
        ("pearson", [1.0, 2.0, 3.0], [1.0, 3.0, 2.0], 0.5),
        ("spearman", [1.0, 10.0, 100.0], [3.0, 4.0, 5.0], 1.0),
        # ranks 1.5 1.5 3 4 against 1 2 3 4; with three values any rank of the tie would do
        ("spearman", [7.0, 7.0, 8.0, 9.0], [1.0, 2.0, 3.0, 4.0], np.sqrt(0.9)),
    ],
)
def test_metrics_match_worked_examples(name, predictions, labels, value):
    assert metrics.METRICS[name](predictions, labels) == pytest.approx(value)


def test_score_of_classes_and_of_regression():
    assert metrics.score(("accuracy",), np.array([[1.0, 1.0], [0.0, 2.0]]), [0, 1]) == {"accuracy": 1.0}
    assert metrics.score(("pearson",), np.array([[1.0], [3.0]]), [0.0, 5.0])["pearson"] == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"metrics: expected names among .*got \['bleu'\]"):
        metrics.score(("bleu",), np.zeros((1, 2)), [0])


@pytest.mark.parametrize(("predictions", "labels"), [([], []), ([1], [1, 0]), ([[1]], [1])])
def test_metrics_refuse_wrong_shapes(predictions, labels):
    with pytest.raises(ValueError, match=r"expected predictions and labels of one shape"):
        metrics.accuracy(predictions, labels)
