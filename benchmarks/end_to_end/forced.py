"""Mixes of exits: forced by thresholds, with real exits and real decisions, or a trained model's own."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import earlyexit_kernels as ee
from benchmarks.machine import MODEL_VARIABLE, NotMeasuredError
from earlyexit_kernels.criteria import Criterion, Entropy

#: All layers and only the last exit; all exits and decisions, and no row leaves; the same with the family's own exits,
#: which have a dense layer; a trained model's own exits.
FULL, NEVER, FAMILY, OWN = "full depth", "never exit", "never exit, family heads", "own exits"
#: Layer speed-up that the trained model's own exits are set to.
OWN_SPEED_UP = 1.9


def long_tail(rows: int, depth: int, share: float) -> list[int]:
    """Return each row's exit layer, sorted: at every layer the same fraction of the live rows leaves.

    About `share` of all layer-rows run; the last rows run almost alone.
    """

    def exits(rate: float) -> list[int]:
        live = [round(rows * rate**layer) for layer in range(depth)] + [0]
        return [layer for layer in range(1, depth + 1) for _ in range(live[layer - 1] - live[layer])]

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(exits(middle)) < share * rows * depth else (low, middle)
    return exits(high)


def uniform(rows: int, depth: int, share: float) -> list[int]:
    """Return each row's exit layer, sorted: equally many rows leave at every layer up to a last one.

    About `share` of all layer-rows run, at most about half.
    """
    span = 2 * (share * depth - 1)
    return [min(depth, round(1 + span * (row + 0.5) / rows)) for row in range(rows)]


def together(rows: int, depth: int, share: float) -> list[int]:
    """Return the exit layer of each row if all leave after `share` of the layers."""
    return [max(1, round(share * depth))] * rows


#: Mix -> ``(rows, depth) -> exit layer of each row``.
MIXES: dict[str, Callable[[int, int], list[int]]] = {
    **dict.fromkeys((NEVER, FAMILY), lambda rows, depth: [depth] * rows),
    "all at layer 1": lambda rows, depth: [1] * rows,
    **{f"all at {share} %": partial(together, share=share / 100) for share in (25, 50, 75)},
    **{f"uniform, {share} %": partial(uniform, share=share / 100) for share in (50, 39, 25, 23, 18)},
    **{f"long tail, {share} %": partial(long_tail, share=share / 100) for share in (39, 23, 18)},
    "one row stays": lambda rows, depth: [1] * (rows - 1) + [depth],
}


def entropy_per_exit(logits: Tensor) -> Tensor:
    """Return the entropy ``[N, L]`` in nats of the exits' logits ``[N, L, C]``."""
    return torch.special.entr(logits.double().softmax(-1)).sum(-1)


def rule_for(exits: str, trace: ee.ExitTrace, *, trained: bool) -> Criterion | None:
    """Return the criterion under which the rows of a trace leave as in a mix.

    Args:
        exits: `FULL`, `OWN` or a name of `MIXES`.
        trace: of all rows that will run.
        trained: whether the model is trained; only then it has exits of its own.

    Raises:
        NotMeasuredError: `OWN` of a model with random weights.
    """
    if exits == FULL:
        return None
    if exits == OWN:
        if not trained:
            raise NotMeasuredError(
                f"random weights have no exits of their own; name a trained folder with --model or {MODEL_VARIABLE}"
            )
        return own_rule(trace, OWN_SPEED_UP)
    rows, depth = trace.logits.shape[:2]
    return forced_rule(trace, MIXES[exits](rows, depth))


def forced_rule(trace: ee.ExitTrace, schedule: list[int]) -> Entropy:
    """Return entropy thresholds, one per exit, under which as many rows leave at every exit as in a schedule.

    Each lies between the entropies of the rows that leave and of those that stay.
    """
    entropy = entropy_per_exit(trace.logits)
    rows, depth = entropy.shape
    live = torch.arange(rows, device=entropy.device)
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
    return Entropy(threshold=thresholds)


def own_rule(trace: ee.ExitTrace, speed_up: float) -> Entropy:
    """Return one entropy threshold for all exits, between two scores, that runs about `speed_up` times fewer layers."""
    scores = entropy_per_exit(trace.logits[:, :-1]).unique()
    between = ((scores[1:] + scores[:-1]) / 2).tolist()

    def mean_layer(threshold: float) -> float:
        return float(ee.replay(trace, Entropy(threshold=threshold))[1].double().mean())

    # more rows leave as the threshold grows
    place = bisect.bisect_left(between, -trace.depth / speed_up, key=lambda threshold: -mean_layer(threshold))
    return Entropy(threshold=between[min(place, len(between) - 1)])
