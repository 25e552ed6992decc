"""Rows with the metric that they are scored by, and criteria evaluated on them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from earlyexit_kernels.criteria import Criterion
from earlyexit_kernels.engine.replay import replay_each
from earlyexit_kernels.tuning.intervals import standard_error
from earlyexit_kernels.tuning.metrics import METRICS, pearson, predictions_of
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
        metric: name in `METRICS`.
        problem_type: as in transformers.
    """

    trace: ExitTrace
    labels: NDArray
    metric: str
    problem_type: str

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: NDArray) -> Rows:
        """Return some of the rows."""
        return replace(self, trace=self.trace.take(torch.from_numpy(rows)), labels=self.labels[rows])

    @property
    def function(self) -> Callable[..., float]:
        """The metric as a function of predictions and labels."""
        return METRICS["accuracy" if self.metric == AGREEMENT else self.metric]

    def score(self, predictions: NDArray) -> float:
        """Return the metric of predictions ``[N]``."""
        return self.function(predictions, self.labels)

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

        For regression: whether its correlation with the labels is within two standard errors of 0.
        """
        rows, predictions = len(self), self.at_layer(layer)
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
                standard_error(self.function, predictions, full, self.labels),
                float(self.lost(predictions).mean()),
            )
            for rule, predictions, layers in self.replay(criteria)
        ]
        return sorted(found, key=lambda s: (-s.mean_exit_layer, s.score))
