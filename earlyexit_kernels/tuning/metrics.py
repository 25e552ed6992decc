"""Metrics of text classification tasks; listed in `METRICS`.

Predictions and labels are class indices ``[N]``, or numbers ``[N]`` for a regression task. F1 and Matthews correlation
are those of scikit-learn, ranks those of scipy (extra ``tuning``). Metrics of rankings are in `ranking`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from earlyexit_kernels.tuning.ranking import RANKING_METRICS

#: Bins of `ece`.
BINS = 15


def _arrays(predictions: ArrayLike, labels: ArrayLike) -> tuple[NDArray, NDArray]:
    predicted, truth = np.asarray(predictions, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if predicted.ndim != 1 or predicted.shape != truth.shape or not len(truth):
        raise ValueError(
            "metric: expected predictions and labels of one shape [N] with N >= 1, "
            f"got {list(predicted.shape)} and {list(truth.shape)}"
        )
    return predicted, truth


def accuracy(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Return the share of correct rows; with several labels a row ``[N, C]``, all of them must be right."""
    if np.ndim(labels) == 2:
        predicted, truth = np.asarray(predictions), np.asarray(labels)
        if predicted.shape != truth.shape or not len(truth):
            raise ValueError(
                "accuracy: expected predictions and labels of one shape [N, C] with N >= 1, "
                f"got {list(predicted.shape)} and {list(truth.shape)}"
            )
        return float((predicted == truth).all(axis=1).mean())
    predicted, truth = _arrays(predictions, labels)
    return float((predicted == truth).mean())


def matthews(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Return the Matthews correlation of any number of classes, in [-1, 1]; 0 if predictions or labels are constant."""
    predicted, truth = _arrays(predictions, labels)
    return float(_scikit_learn().matthews_corrcoef(truth, predicted))


def f1(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Return the harmonic mean of precision and recall of class 1; 0 without true positives."""
    predicted, truth = _arrays(predictions, labels)
    return float(_scikit_learn().f1_score(truth == 1, predicted == 1, zero_division=0.0))


def macro_f1(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Return the mean over the classes of the harmonic mean of precision and recall."""
    predicted, truth = _arrays(predictions, labels)
    return float(_scikit_learn().f1_score(truth, predicted, average="macro", zero_division=0.0))


def _scikit_learn() -> Any:
    try:
        from sklearn import metrics
    except ImportError as error:
        raise ImportError("this metric requires scikit-learn: `pip install scikit-learn`") from error
    return metrics


def pearson(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Return the linear correlation, in [-1, 1]; 0 if predictions or labels are constant."""
    predicted, truth = _arrays(predictions, labels)
    predicted, truth = predicted - predicted.mean(), truth - truth.mean()
    scale = float(np.sqrt((predicted**2).sum() * (truth**2).sum()))
    return float((predicted * truth).sum()) / scale if scale > 0 else 0.0


def spearman(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Return the linear correlation of the ranks; tied values get their mean rank, and constants have 0."""
    try:
        from scipy.stats import rankdata
    except ImportError as error:
        raise ImportError("spearman requires scipy: `pip install scipy`") from error
    predicted, truth = _arrays(predictions, labels)
    return pearson(rankdata(predicted), rankdata(truth))


def auroc(logits: ArrayLike, labels: ArrayLike) -> float:
    """Return the area under the ROC curve of the class probabilities; the mean over classes, each against the rest."""
    scores, truth = probabilities(np.asarray(logits)), np.asarray(labels)
    if scores.shape[1] == 2:
        return float(_scikit_learn().roc_auc_score(truth, scores[:, 1]))
    classes = np.arange(scores.shape[1])
    return float(_scikit_learn().roc_auc_score(truth, scores, multi_class="ovr", labels=classes))


def ece(logits: ArrayLike, labels: ArrayLike) -> float:
    """Return the expected calibration error of the largest probability, over `BINS` bins of equal width; 0 is best.

    The mean over the rows of the distance of the accuracy of a bin from its mean probability (Naeini et al., 2015).
    """
    scores = probabilities(np.asarray(logits))
    confidence, right = scores.max(axis=1), scores.argmax(axis=1) == np.asarray(labels)
    bins = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    gaps = np.bincount(bins, confidence - right, minlength=BINS)
    return float(np.abs(gaps).sum() / len(confidence))


def probabilities(logits: NDArray) -> NDArray:
    """Return the class probabilities ``[N, C]`` of logits, float64."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


#: Functions of predictions and labels; higher is better.
METRICS: dict[str, Callable[[ArrayLike, ArrayLike], float]] = {
    "accuracy": accuracy,
    "matthews": matthews,
    "f1": f1,
    "macro_f1": macro_f1,
    "pearson": pearson,
    "spearman": spearman,
}
#: Functions of logits ``[N, C]`` and labels; of `ece` the lower, of `auroc` the higher is better.
LOGIT_METRICS: dict[str, Callable[[ArrayLike, ArrayLike], float]] = {"auroc": auroc, "ece": ece}
#: Names of all metrics.
METRIC_NAMES = (*METRICS, *LOGIT_METRICS, *RANKING_METRICS)


def predictions_of(logits: NDArray, problem_type: str | None = None) -> NDArray:
    """Return the predictions of logits ``[N, C]``.

    Args:
        logits: of one exit.
        problem_type: as in transformers; default: regression if C = 1, else single-label classification.

    Returns:
        the logit itself ``[N]`` if C = 1, 0 or 1 for each label ``[N, C]`` for several labels a row, else the first
        largest class ``[N]``.
    """
    if problem_type == "multi_label_classification":
        return (logits > 0).astype(np.int64)
    return logits[:, 0] if logits.shape[1] == 1 else logits.argmax(axis=1)


def score(
    metrics: Sequence[str],
    logits: NDArray,
    labels: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    problem_type: str | None = None,
) -> dict[str, float]:
    """Return the named metrics of logits ``[N, C]`` against labels ``[N]``.

    Args:
        metrics: names in `METRIC_NAMES`.
        logits: of one exit.
        labels: of the rows.
        groups: the query of each row, ``[N]``, for `RANKING_METRICS`.
        problem_type: as for `predictions_of`.

    Raises:
        ValueError: a metric is unknown, or lacks groups or one score a row, or the shapes do not fit.
    """
    unknown = sorted(set(metrics) - set(METRIC_NAMES))
    if unknown:
        raise ValueError(f"metrics: expected names among {sorted(METRIC_NAMES)}, got {unknown}")
    predictions = predictions_of(np.asarray(logits), problem_type)
    return {name: _value(name, logits, predictions, labels, groups) for name in metrics}


def _value(name: str, logits: NDArray, predictions: NDArray, labels: ArrayLike, groups: ArrayLike | None) -> float:
    if name in METRICS:
        return METRICS[name](predictions, labels)
    if name in LOGIT_METRICS:
        return LOGIT_METRICS[name](logits, labels)
    if groups is None or logits.shape[1] != 1:
        raise ValueError(
            f"metrics: {name} expects groups=, the query of each row, and logits [N, 1]; got logits "
            f"{list(logits.shape)} {'without' if groups is None else 'with'} groups"
        )
    return float(RANKING_METRICS[name](predictions, labels, groups).mean())
