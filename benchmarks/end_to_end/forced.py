"""Exits forced by construction on random weights: real heads and real decisions, at exit layers chosen beforehand."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import earlyexit_kernels as ee


def long_tail(rows: int, depth: int, share: float) -> list[int]:
    """Exit layer of each row, sorted, where the same part of the rows still there leaves at every layer.

    About `share` of all layer-rows run; the last rows run on almost alone.
    """

    def exits(rate: float) -> list[int]:
        live = [round(rows * rate**layer) for layer in range(depth)] + [0]
        return [layer for layer in range(1, depth + 1) for _ in range(live[layer - 1] - live[layer])]

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(exits(middle)) < share * rows * depth else (low, middle)
    return exits(high)


def even(rows: int, depth: int, share: float) -> list[int]:
    """Exit layer of each row, sorted, where as many rows leave at every layer from the first to a last one.

    About `share` of all layer-rows run, at most about half.
    """
    span = 2 * (share * depth - 1)
    return [min(depth, round(1 + span * (row + 0.5) / rows)) for row in range(rows)]


MIXES: dict[str, Callable[[int, int, float], list[int]]] = {"even": even, "long tail": long_tail}


def per_exit_entropy(logits: Tensor) -> Tensor:
    """Entropy ``[N, L]`` in nats of the exits' logits ``[N, L, C]``."""
    p = logits.double().softmax(-1)
    return torch.special.entr(p).sum(-1)


def force_exits(
    model: ee.EarlyExitForSequenceClassification, batch: dict[str, Tensor], share: float, mix: str
) -> float:
    """Give `model` entropy thresholds, one for each exit, under which `share` of the layer-rows of `batch` run.

    At each exit the threshold lies between the entropies of the rows that are to leave and of those that stay; `mix`, a
    name of `MIXES`, says how many are to.

    Returns:
        The share of layer-rows that really runs.
    """
    entropy = per_exit_entropy(model.trace(**batch).logits)
    rows, depth = entropy.shape
    schedule = MIXES[mix](rows, depth, share)
    live = torch.arange(rows)
    thresholds = []
    for layer in range(1, depth):
        leaving = schedule.count(layer)
        order = entropy[live, layer - 1].sort()
        if leaving == 0 or live.numel() == 0:
            thresholds.append(0.0)
            continue
        inner = order.values[leaving - 1 : leaving + 1]
        thresholds.append(float(inner.mean()) if inner.numel() == 2 else float(inner[0]) + 1.0)
        live = live[order.indices[leaving:]]
    model.set_criterion(ee.criteria.Entropy(threshold=thresholds))
    return float(model(**batch).layers_run.double().mean()) / depth
