"""Metrics of text classification tasks; listed in `METRICS`.

Predictions and labels are class indices ``[N]``, or numbers ``[N]`` for a regression task. Higher is better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray


def _arrays(predictions: ArrayLike, labels: ArrayLike) -> tuple[NDArray, NDArray]:
    predicted, truth = np.asarray(predictions, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if predicted.ndim != 1 or predicted.shape != truth.shape or not len(truth):
        raise ValueError(
            "metric: expected predictions and labels of one shape [N] with N >= 1, "
            f"got {list(predicted.shape)} and {list(truth.shape)}"
        )
    return predicted, truth


def accuracy(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Return the share of correct rows."""
    predicted, truth = _arrays(predictions, labels)
    return float((predicted == truth).mean())


def matthews(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Return the Matthews correlation of classes 0 and 1, in [-1, 1]; 0 if predictions or labels are constant."""
    predicted, truth = _arrays(predictions, labels)
    if not (np.isin(predicted, (0, 1)).all() and np.isin(truth, (0, 1)).all()):
        raise ValueError("matthews: expected classes 0 and 1 only")
    return pearson(predicted, truth)


def f1(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Return the harmonic mean of precision and recall of class 1; 0 without true positives."""
    predicted, truth = _arrays(predictions, labels)
    true_positives = float(((predicted == 1) & (truth == 1)).sum())
    positives = float((predicted == 1).sum() + (truth == 1).sum())
    return 2 * true_positives / positives if positives else 0.0


def pearson(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Return the linear correlation, in [-1, 1]; 0 if predictions or labels are constant."""
    predicted, truth = _arrays(predictions, labels)
    predicted, truth = predicted - predicted.mean(), truth - truth.mean()
    scale = float(np.sqrt((predicted**2).sum() * (truth**2).sum()))
    return float((predicted * truth).sum()) / scale if scale > 0 else 0.0


def spearman(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Return the linear correlation of the ranks; tied values get their mean rank."""
    predicted, truth = _arrays(predictions, labels)
    return pearson(_ranks(predicted), _ranks(truth))


def _ranks(values: NDArray) -> NDArray:
    """Return 1-based ranks ``[N]``; tied values get their mean rank."""
    _, group, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[group]


METRICS: dict[str, Callable[[ArrayLike, ArrayLike], float]] = {
    "accuracy": accuracy,
    "matthews": matthews,
    "f1": f1,
    "pearson": pearson,
    "spearman": spearman,
}


def predictions_of(logits: NDArray) -> NDArray:
    """Return the predictions ``[N]`` of logits ``[N, C]``: the first largest class, or the logit itself if C = 1."""
    return logits[:, 0] if logits.shape[1] == 1 else logits.argmax(axis=1)


def score(metrics: Sequence[str], logits: NDArray, labels: ArrayLike) -> dict[str, float]:
    """Return the named metrics of logits ``[N, C]`` against labels ``[N]``.

    Raises:
        ValueError: a metric is unknown, or the shapes do not fit.
    """
    unknown = sorted(set(metrics) - set(METRICS))
    if unknown:
        raise ValueError(f"metrics: expected names among {sorted(METRICS)}, got {unknown}")
    predictions = predictions_of(np.asarray(logits))
    return {name: METRICS[name](predictions, labels) for name in metrics}
