"""Intervals of the drop in score."""

from __future__ import annotations

import numpy as np
import pytest

from earlyexit_kernels.tuning.metrics import METRICS
from earlyexit_kernels.tuning.rows import drop_interval


@pytest.mark.parametrize("metric", ["accuracy", "f1"])
def test_interval_of_equal_answers_is_as_wide_as_the_rows_allow(metric):
    """Rows of which one in a hundred differs look all alike in 5 % of the draws of 298 rows: the rule of three."""
    labels = np.arange(298) % 2
    low, high = drop_interval(METRICS[metric], labels, labels, labels)
    assert (low, high) == pytest.approx((-0.01, 0.01), rel=0.01)
    few = drop_interval(METRICS[metric], labels[:10], labels[:10], labels[:10])
    assert few[1] == pytest.approx(0.2589, abs=1e-4)


def test_interval_of_the_drop_covers_the_truth_about_19_times_in_20():
    generator, covered = np.random.default_rng(0), 0
    for _ in range(200):
        right, early = generator.random((2, 400)) < np.array([[0.9], [0.87]])
        labels = np.ones(400, dtype=int)
        low, high = drop_interval(METRICS["accuracy"], right.astype(int), early.astype(int), labels)
        covered += low <= 0.03 <= high
    assert 180 <= covered <= 198
