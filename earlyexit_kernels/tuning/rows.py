"""Rows with the metric that they are scored by: criteria evaluated on them, and how sure their scores are."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from earlyexit_kernels.core.replay import replay_each
from earlyexit_kernels.criteria import Criterion
from earlyexit_kernels.tuning.metrics import METRICS, accuracy, pearson, predictions_of, score
from earlyexit_kernels.tuning.ranking import RANKING_METRICS
from earlyexit_kernels.types import ExitTrace

Metric: TypeAlias = Callable[[NDArray, NDArray], float]
#: Metric where the answers of full depth stand for labels: the share of rows with the same answer.
AGREEMENT = "agreement"
#: Groups of rows, one of which the jackknife leaves out at a time.
GROUPS = 20
#: Draws of the bootstrap, and of random exits for metrics that are not a mean over rows and so have no closed form.
DRAWS, RANDOM_DRAWS = 1000, 25


@dataclass(frozen=True)
class Answers:
    """What a criterion does on N rows.

    Attributes:
        criterion: the rule.
        logits: ``[N, C]``, of the answers.
        exit_layer: ``[N]``, 1-based.
        layers_run: ``[N]``; fewer than `exit_layer` where layers are skipped.
    """

    criterion: Criterion
    logits: NDArray
    exit_layer: NDArray
    layers_run: NDArray


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
        return score_error(metric, values, labels)

    def standard_error(self, first: NDArray, second: NDArray) -> float:
        """Return the standard error of the difference of the scores of two predictions ``[N]``."""
        metric, (of_first, of_second), labels = self._drawn(first, second)
        return standard_error(metric, of_first, of_second, labels)

    def drop_interval(self, early: NDArray) -> tuple[float, float]:
        """Return the 95 % interval of what predictions ``[N]`` lose against full depth."""
        metric, (of_full, of_early), labels = self._drawn(self.full_depth, early)
        return drop_interval(metric, of_full, of_early, labels)

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
        return self._full_depth_right & ~self.right(predictions)

    @functools.cached_property
    def _full_depth_right(self) -> NDArray:
        return self.right(self.full_depth)

    def truncations(self, metrics: Sequence[str]) -> tuple[dict[str, float], ...]:
        """Return the scores of each exit alone, i.e. of the model truncated to its first k = 1..L layers."""
        return tuple(self.scores(metrics, self.trace.logits[:, k].numpy()) for k in range(self.trace.depth))

    def scores(self, metrics: Sequence[str], logits: NDArray) -> dict[str, float]:
        """Return the named metrics of logits ``[N, C]``."""
        return score(metrics, logits, self.labels, groups=self.groups, problem_type=self.problem_type)

    def random_exit(self, shares: Sequence[float]) -> float:
        """Return the expected score if the rows that leave at each layer are drawn at random.

        Accuracy is a mean over rows; its expectation is ``sum_k share_k * accuracy_k``. Other metrics are averaged over
        `RANDOM_DRAWS` seeded draws.

        Args:
            shares: share of rows for each of the L layers; they sum to 1.
        """
        if self.metric == "accuracy":
            return float(np.dot(shares, self._accuracies))
        generator, rows = np.random.default_rng(0), len(self)
        counts = np.rint(np.cumsum(shares) * rows).astype(int)
        layers = np.searchsorted(counts, np.arange(rows), side="right").clip(max=self.trace.depth - 1)
        logits, every = self.trace.logits.numpy(), np.arange(rows)
        draws = [logits[every, generator.permutation(layers)] for _ in range(RANDOM_DRAWS)]
        return float(np.mean([self.scores((self.metric,), drawn)[self.metric] for drawn in draws]))

    @functools.cached_property
    def _accuracies(self) -> list[float]:
        return [layer["accuracy"] for layer in self.truncations(("accuracy",))]

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
        return bool(self.right(predictions).mean() <= chance + 2 * math.sqrt(chance * (1 - chance) / rows))

    def right(self, predictions: NDArray) -> NDArray:
        """Return which predictions are right, ``[N]`` bool; with several labels a row, all of them must be."""
        equal: NDArray = np.equal(predictions, self.labels)
        return np.all(equal.reshape(len(self), -1), axis=1)

    @functools.cached_property
    def right_by_layer(self) -> NDArray:
        """Which rows each exit answers correctly, ``[N, L]`` bool."""
        return np.stack([self.right(self.at_layer(k)) for k in range(1, self.trace.depth + 1)], axis=1)

    def replay(self, criteria: Sequence[Criterion]) -> Iterator[Answers]:
        """Yield the answers of each criterion, in one pass over blocks of the trace."""
        found = replay_each(self.trace, criteria, problem_type=self.problem_type)
        for rule, (logits, layers) in zip(criteria, found, strict=True):
            yield Answers(rule, logits.numpy(), layers.numpy(), layers.numpy())

    def predictions(self, answers: Answers) -> NDArray:
        """Return the predictions ``[N]`` of answers."""
        return predictions_of(answers.logits, self.problem_type)

    def settings(self, criteria: Sequence[Criterion]) -> list[Setting]:
        """Return the results of some criteria, slowest first."""
        full, found = self.full_depth, []
        for answers in self.replay(criteria):
            predictions = self.predictions(answers)
            error, risk = self.standard_error(predictions, full), float(self.lost(predictions).mean())
            mean = float(answers.exit_layer.mean())
            found.append(Setting(answers.criterion, mean, self.score(predictions), error, risk))
        return sorted(found, key=lambda s: (-s.mean_exit_layer, s.score))


def _mean(values: NDArray, _: NDArray) -> float:
    """Return the mean of the values of queries, as a metric."""
    return float(values.mean())


def exit_shares(exit_layer: NDArray, depth: int) -> tuple[float, ...]:
    """Return the share of the rows that leave at each layer 1..L."""
    counts = np.bincount(exit_layer, minlength=depth + 1)[1:]
    return tuple(float(share) for share in counts / len(exit_layer))


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
