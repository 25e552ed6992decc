"""Metrics of rankings: how well scores order the documents of each query; listed in `RANKING_METRICS`.

Rows are documents with a score, a relevance of at least 0 and the group that they belong to, a query. Queries with one
document, or without a relevant one, have the same value in any order and are left out. Documents with equal scores
count as in any order: their value is the mean over these orders, so that a constant score has that of a random order.

scikit-learn's `ndcg_score` takes one query, or queries with equally many documents; here all are computed at once,
since a sweep scores thousands of rankings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: ``(predictions, labels, groups) -> value of each query that counts``.
Ranking: TypeAlias = Callable[[ArrayLike, ArrayLike, ArrayLike], NDArray]

#: Documents of a query that count, those with the highest scores.
CUT = 10


def counted(labels: ArrayLike, groups: ArrayLike) -> NDArray:
    """Return which rows belong to queries with at least two documents, one of them relevant, ``[N]`` bool."""
    truth, group = np.asarray(labels, dtype=np.float64), _numbers(groups)
    return ((np.bincount(group) > 1) & (np.bincount(group, truth > 0) > 0))[group]


def check_groups(name: str, labels: ArrayLike, groups: ArrayLike, *, least: int = 1) -> None:
    """Raise if too few queries count.

    Args:
        name: of the rows, for the message.
        labels: relevance ``[N]``.
        groups: queries ``[N]``.
        least: number of queries required.

    Raises:
        ValueError: says how many there are, and why the others do not count.
    """
    truth, group = np.asarray(labels, dtype=np.float64), _numbers(groups)
    found = len(np.unique(group[counted(truth, group)]))
    if found < least:
        sizes = np.bincount(group)
        alone = int((sizes == 1).sum())
        without = int(((sizes > 1) & (np.bincount(group, truth > 0) == 0)).sum())
        raise ValueError(
            f"{name}: expected at least {least} {'query' if least == 1 else 'queries'} with two or more rows, one of "
            f"them relevant (a label above 0), got {found}; of {len(sizes)} queries {alone} have one row, and "
            f"{without} more have no relevant one"
        )


def ndcg(predictions: ArrayLike, labels: ArrayLike, groups: ArrayLike) -> NDArray:
    """Return the normalised discounted cumulative gain of the first `CUT` documents of each query that counts.

    The gain of a document is its relevance, its discount ``1 / log2(rank + 1)``, as in scikit-learn's `ndcg_score`.

    Args:
        predictions: scores ``[N]``; the highest is ranked first.
        labels: relevance ``[N]``, at least 0.
        groups: queries ``[N]``.

    Raises:
        ValueError: the shapes differ, a number is not finite, a label is negative, or no query counts.
    """
    scores, truth, group = _arrays(predictions, labels, groups)
    return _gain(scores, truth, group) / _gain(truth, truth, group)


def mrr(predictions: ArrayLike, labels: ArrayLike, groups: ArrayLike) -> NDArray:
    """Return ``1 / rank`` of the first relevant document of each query that counts, 0 if it is not among `CUT`.

    Arguments and errors as for `ndcg`; documents with a label above 0 are relevant.
    """
    scores, truth, group = _arrays(predictions, labels, groups)
    order, rank, tie = _ranked(scores, group)
    first, size = np.unique(tie, return_index=True)[1], np.bincount(tie)
    relevant = np.bincount(tie, truth[order] > 0)
    queries, tied = np.unique(group[order][first][relevant > 0], return_index=True)
    before, size, relevant = rank[first][relevant > 0][tied], size[relevant > 0][tied], relevant[relevant > 0][tied]
    value, none_yet = np.zeros(len(queries)), np.ones(len(queries))
    for place in range(CUT):  # of the first relevant document within its tie
        left = np.maximum(size - place, 1)
        here = np.minimum(relevant / left, 1.0)
        value += np.where(before + place < CUT, none_yet * here / (before + place + 1), 0.0)
        none_yet = none_yet * (1 - here)
    return value


#: Functions of scores, relevance and queries; the score is the mean of their values, and higher is better.
RANKING_METRICS: dict[str, Ranking] = {"ndcg": ndcg, "mrr": mrr}


def _arrays(predictions: ArrayLike, labels: ArrayLike, groups: ArrayLike) -> tuple[NDArray, NDArray, NDArray]:
    """Return the scores, relevance and numbers of the queries of the rows that count.

    Raises:
        ValueError: as for `ndcg`.
    """
    scores, truth = np.asarray(predictions), np.asarray(labels, dtype=np.float64)
    if scores.ndim != 1 or not scores.shape == truth.shape == np.shape(groups) or not len(scores):
        raise ValueError(
            "metric: expected scores, labels and groups of one shape [N] with N >= 1, got "
            f"{list(scores.shape)}, {list(truth.shape)} and {list(np.shape(groups))}"
        )
    if not (np.isfinite(scores).all() and np.isfinite(truth).all() and (truth >= 0).all()):
        raise ValueError("metric: expected finite scores, and finite labels of at least 0")
    check_groups("metric", truth, groups)
    rows = counted(truth, groups)
    return scores[rows], truth[rows], _numbers(np.asarray(groups)[rows])


def _numbers(groups: ArrayLike) -> NDArray:
    """Return the number 0..Q-1 of each row's query."""
    return np.unique(np.asarray(groups), return_inverse=True)[1]


def _ranked(scores: NDArray, group: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """Return the rows by query and falling score, their 0-based ranks, and the number of the tie that each is in."""
    order = np.lexsort((-scores, group))
    sizes = np.bincount(group)
    rank = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    new = (rank == 0) | (np.diff(scores[order], prepend=np.nan) != 0)
    return order, rank, np.cumsum(new) - 1


def _gain(scores: NDArray, truth: NDArray, group: NDArray) -> NDArray:
    """Return the discounted cumulative gain of each query."""
    order, rank, tie = _ranked(scores, group)
    discount = np.where(rank < CUT, 1 / np.log2(rank + 2), 0.0)
    mean = np.bincount(tie, discount) / np.bincount(tie)
    return np.bincount(group[order], truth[order] * mean[tie])
