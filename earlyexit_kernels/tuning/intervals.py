"""Uncertainty of the difference between two scores of the same rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from earlyexit_kernels.tuning.metrics import accuracy

Metric: TypeAlias = Callable[[NDArray, NDArray], float]
#: Groups of rows, one of which the jackknife leaves out at a time.
GROUPS = 20
#: Draws of the bootstrap.
DRAWS = 1000


def standard_error(metric: Metric, first: NDArray, second: NDArray, labels: NDArray) -> float:
    """Return the standard error of ``metric(first) - metric(second)`` over the draw of the rows.

    For accuracy from the variance of the difference of a row, else by the jackknife over `GROUPS` groups of rows.

    Args:
        metric: function of predictions and labels.
        first, second: predictions ``[N]``.
        labels: ``[N]``.
    """
    rows = len(labels)
    if rows < 2 or np.array_equal(first, second):
        return 0.0
    if metric is accuracy and labels.ndim == 1:
        differences = (first == labels).astype(np.float64) - (second == labels)
        return float(differences.std(ddof=1) / math.sqrt(rows))
    return _jackknife(lambda kept: metric(first[kept], labels[kept]) - metric(second[kept], labels[kept]), rows)


def score_error(metric: Metric, predictions: NDArray, labels: NDArray) -> float:
    """Return the standard error of ``metric(predictions)`` over the draw of the rows.

    For accuracy ``sqrt(p (1 - p) / N)``, else by the jackknife over `GROUPS` groups of rows.

    Args:
        metric: function of predictions and labels.
        predictions: ``[N]``.
        labels: ``[N]``.
    """
    if metric is accuracy:
        share = accuracy(predictions, labels)
        return math.sqrt(share * (1 - share) / len(labels))
    return _jackknife(lambda kept: metric(predictions[kept], labels[kept]), len(labels))


def _jackknife(statistic: Callable[[NDArray], float], rows: int) -> float:
    """Return the standard error of a statistic of the rows in a mask ``[N]``; 0 for one row."""
    if rows < 2:
        return 0.0
    groups = min(GROUPS, rows)
    group = np.random.default_rng(0).permutation(rows) % groups
    values = np.array([statistic(group != left_out) for left_out in range(groups)])
    return float(np.sqrt((groups - 1) / groups * ((values - values.mean()) ** 2).sum()))


def drop_interval(metric: Metric, full: NDArray, early: NDArray, labels: NDArray) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of ``metric(full) - metric(early)``, drawing rows in pairs.

    Where all predictions agree, no draw differs. The interval is then that of a share of which none was seen in N rows:
    at most 1 - 0.05^(1 / N), about 3 / N, either way.

    Args:
        metric: function of predictions and labels.
        full, early: predictions ``[N]``.
        labels: ``[N]``.
    """
    generator, rows = np.random.default_rng(0), len(labels)
    if np.array_equal(full, early):
        most = 1 - 0.05 ** (1 / rows)
        return -most, most
    if metric is accuracy and labels.ndim == 1:
        differences = (full == labels).astype(np.int64) - (early == labels)
        shares = np.bincount(differences + 1, minlength=3) / rows
        counts = generator.multinomial(rows, shares, size=DRAWS)
        drops = (counts[:, 2] - counts[:, 0]) / rows
    else:
        draws = (generator.integers(rows, size=rows) for _ in range(DRAWS))
        drops = np.array([metric(full[d], labels[d]) - metric(early[d], labels[d]) for d in draws])
    low, high = np.quantile(drops, (0.025, 0.975))
    return float(low), float(high)
