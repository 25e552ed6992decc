"""Rows with the metric that they are scored by, and criteria evaluated on them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from earlyexit_kernels.core.replay import replay_each
from earlyexit_kernels.criteria import Criterion
from earlyexit_kernels.tuning import intervals
from earlyexit_kernels.tuning.metrics import METRICS, pearson, predictions_of
from earlyexit_kernels.tuning.ranking import RANKING_METRICS
from earlyexit_kernels.types import ExitTrace

#: Metric where the answers of full depth stand for labels: the share of rows with the same answer.
AGREEMENT = "agreement"


@dataclass(frozen=True)
class Setting:
    """A criterion with its results on the tuning rows.

    Attributes:
        criterion: the setting.
        mean_exit_layer: mean 1-based layer of the answering exit.
        score: value of the metric.
        standard_error: of the difference from the score of full depth.
        risk: share of the rows that full depth answers correctly and the criterion does not.
    """

    criterion: Criterion
    mean_exit_layer: float
    score: float
    standard_error: float
    risk: float


@dataclass(frozen=True)
class Rows:
    """A trace with the labels and the metric that it is scored by.

    Attributes:
        trace: of N rows.
        labels: ``[N]``, or ``[N, C]`` for several labels a row.
        metric: name in `METRICS`, or in `RANKING_METRICS` with groups.
        problem_type: as in transformers.
        groups: the query of each row, ``[N]``, or None.
    """

    trace: ExitTrace
    labels: NDArray
    metric: str
    problem_type: str
    groups: NDArray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: NDArray) -> Rows:
        """Return some of the rows."""
        groups = None if self.groups is None else self.groups[rows]
        return replace(self, trace=self.trace.take(torch.from_numpy(rows)), labels=self.labels[rows], groups=groups)

    def score(self, predictions: NDArray) -> float:
        """Return the metric of predictions ``[N]``."""
        metric, (values,), labels = self._drawn(predictions)
        return metric(values, labels)

    def score_error(self, predictions: NDArray) -> float:
        """Return the standard error of the score of predictions ``[N]``, over the draw of the rows or queries."""
        metric, (values,), labels = self._drawn(predictions)
        return intervals.score_error(metric, values, labels)

    def standard_error(self, first: NDArray, second: NDArray) -> float:
        """Return the standard error of the difference of the scores of two predictions ``[N]``."""
        metric, (of_first, of_second), labels = self._drawn(first, second)
        return intervals.standard_error(metric, of_first, of_second, labels)

    def drop_interval(self, early: NDArray) -> tuple[float, float]:
        """Return the 95 % interval of what predictions ``[N]`` lose against full depth."""
        metric, (of_full, of_early), labels = self._drawn(self.full_depth, early)
        return intervals.drop_interval(metric, of_full, of_early, labels)

    def _drawn(self, *predictions: NDArray) -> tuple[Callable[..., float], tuple[NDArray, ...], NDArray]:
        """Return a metric, and the values and labels that it takes: of rows, or for a ranking of queries."""
        if self.metric not in RANKING_METRICS:
            return METRICS["accuracy" if self.metric == AGREEMENT else self.metric], predictions, self.labels
        assert self.groups is not None
        values = tuple(RANKING_METRICS[self.metric](each, self.labels, self.groups) for each in predictions)
        return _mean, values, values[0]

    def at_layer(self, layer: int) -> NDArray:
        """Return the predictions of the exit after 1-based `layer`."""
        return predictions_of(self.trace.logits[:, layer - 1].numpy(), self.problem_type)

    @functools.cached_property
    def full_depth(self) -> NDArray:
        """Predictions of the last exit."""
        return self.at_layer(self.trace.depth)

    def lost(self, predictions: NDArray) -> NDArray:
        """Return which rows full depth answers correctly and `predictions` do not, ``[N]`` bool."""
        return self._full_depth_right & ~self._right(predictions)

    @functools.cached_property
    def _full_depth_right(self) -> NDArray:
        return self._right(self.full_depth)

    def is_chance(self, layer: int) -> bool:
        """Return whether an exit is no better than the most frequent label, by two standard errors.

        For regression: whether its correlation with the labels is within two standard errors of 0; for a ranking:
        whether it is within two standard errors of the mean over all orders, which is the score of a constant.
        """
        rows, predictions = len(self), self.at_layer(layer)
        if self.metric in RANKING_METRICS:
            constant = np.zeros_like(predictions)
            gain = self.score(predictions) - self.score(constant)
            return gain <= 2 * self.standard_error(predictions, constant)
        if self.problem_type == "regression":
            return pearson(predictions, self.labels) <= 2 / math.sqrt(rows)
        if self.metric == AGREEMENT:
            return False
        counts = np.unique(self.labels, axis=0, return_counts=True)[1]
        chance = counts.max() / rows
        return bool(self._right(predictions).mean() <= chance + 2 * math.sqrt(chance * (1 - chance) / rows))

    def _right(self, predictions: NDArray) -> NDArray:
        equal: NDArray = np.equal(predictions, self.labels)
        return equal if equal.ndim == 1 else np.all(equal, axis=1)

    def replay(self, criteria: Sequence[Criterion]) -> Iterator[tuple[Criterion, NDArray, NDArray]]:
        """Yield each criterion with its predictions and exit layers ``[N]``."""
        answers = replay_each(self.trace, criteria, problem_type=self.problem_type)
        for rule, (logits, layers) in zip(criteria, answers, strict=True):
            yield rule, predictions_of(logits.numpy(), self.problem_type), layers.numpy()

    def settings(self, criteria: Sequence[Criterion]) -> list[Setting]:
        """Return the results of some criteria, slowest first."""
        full = self.full_depth
        found = [
            Setting(
                rule,
                float(layers.mean()),
                self.score(predictions),
                self.standard_error(predictions, full),
                float(self.lost(predictions).mean()),
            )
            for rule, predictions, layers in self.replay(criteria)
        ]
        return sorted(found, key=lambda s: (-s.mean_exit_layer, s.score))


def _mean(values: NDArray, _: NDArray) -> float:
    """Return the mean of the values of queries, as a metric."""
    return float(values.mean())
