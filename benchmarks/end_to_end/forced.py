"""Exits forced by construction on random weights: real heads and real decisions, at exit layers chosen beforehand."""

from __future__ import annotations

import torch
from torch import Tensor

import earlyexit_kernels as ee


def geometric_schedule(rows: int, depth: int, share: float) -> list[int]:
    """Exit layer of each row so that about `share` of all layer-rows run and the batch thins out evenly.

    Returns:
        exit layers in [1, depth], sorted.
    """

    def exits(rate: float) -> list[int]:
        live = [round(rows * rate**layer) for layer in range(depth)] + [0]
        return [layer for layer in range(1, depth + 1) for _ in range(live[layer - 1] - live[layer])]

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(exits(middle)) < share * rows * depth else (low, middle)
    return exits(high)


def per_exit_entropy(logits: Tensor) -> Tensor:
    """Entropy ``[N, L]`` in nats of the exits' logits ``[N, L, C]``."""
    p = logits.double().softmax(-1)
    return torch.special.entr(p).sum(-1)


def force_exits(model: ee.EarlyExitForSequenceClassification, batch: dict[str, Tensor], share: float) -> float:
    """Give `model` entropy thresholds, one for each exit, under which `share` of the layer-rows of `batch` run.

    At each exit the threshold lies between the entropies of the rows that are to leave and of those that stay.

    Returns:
        The share of layer-rows that really runs.
    """
    entropy = per_exit_entropy(model.trace(**batch).logits)
    rows, depth = entropy.shape
    schedule = geometric_schedule(rows, depth, share)
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
