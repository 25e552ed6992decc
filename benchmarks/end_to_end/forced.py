"""Who leaves where: exits forced by thresholds, with real exits and real decisions, and a trained model's own exits."""

from __future__ import annotations

import bisect
from collections.abc import Callable

import torch
from torch import Tensor

import earlyexit_kernels as ee
from benchmarks.end_to_end.models import MODEL_VARIABLE, NotMeasuredError
from earlyexit_kernels.criteria import Criterion, Entropy

#: Every layer on every row and only the last exit; every exit and decision, and nobody leaves; the same with the
#: family's own heads, which have a dense layer; the trained model's own exits.
FULL, NEVER, FAMILY, OWN = "full depth", "never exit", "never exit, family heads", "own exits"
#: How many times fewer layers the trained model's own exits are set to run.
OWN_SPEED_UP = 1.9


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


def uniform(rows: int, depth: int, share: float) -> list[int]:
    """Exit layer of each row, sorted, where as many rows leave at every layer from the first to a last one.

    About `share` of all layer-rows run, at most about half.
    """
    span = 2 * (share * depth - 1)
    return [min(depth, round(1 + span * (row + 0.5) / rows)) for row in range(rows)]


def together(rows: int, depth: int, share: float) -> list[int]:
    """Exit layer of each row where all leave after `share` of the layers."""
    return [max(1, round(share * depth))] * rows


def one_stays(rows: int, depth: int) -> list[int]:
    """Exit layer of each row, sorted, where all leave at the first layer but one, which runs to the end."""
    return [1] * (rows - 1) + [depth]


_Schedule = Callable[[int, int], list[int]]


def _shared(schedule: Callable[[int, int, float], list[int]], share: float) -> _Schedule:
    return lambda rows, depth: schedule(rows, depth, share)


#: Mix -> exit layer of each of some rows of a model of some depth.
MIXES: dict[str, _Schedule] = {
    **dict.fromkeys((NEVER, FAMILY), lambda rows, depth: [depth] * rows),
    "all at layer 1": lambda rows, depth: [1] * rows,
    **{f"all at {share} %": _shared(together, share / 100) for share in (25, 50, 75)},
    **{f"uniform, {share} %": _shared(uniform, share / 100) for share in (50, 39, 23, 18)},
    **{f"long tail, {share} %": _shared(long_tail, share / 100) for share in (39, 23, 18)},
    "one row stays": one_stays,
}


def per_exit_entropy(logits: Tensor) -> Tensor:
    """Entropy ``[N, L]`` in nats of the exits' logits ``[N, L, C]``."""
    return torch.special.entr(logits.double().softmax(-1)).sum(-1)


def rule_for(exits: str, trace: ee.ExitTrace, *, trained: bool) -> Criterion | None:
    """The rule under which the rows of a trace leave as a name says.

    Args:
        exits: `FULL`, `OWN` or a name of `MIXES`.
        trace: of all rows that will run.
        trained: whether the model's own exits mean anything.

    Raises:
        NotMeasuredError: the model's own exits, of random weights.
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
    """Entropy thresholds, one for each exit, under which as many rows leave at every exit as a schedule says.

    Each lies between the entropies of the rows that are to leave and of those that stay.
    """
    entropy = per_exit_entropy(trace.logits)
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
    """One entropy threshold for all exits, between two scores, under which about `speed_up` times fewer layers run."""
    scores = per_exit_entropy(trace.logits[:, :-1]).unique()
    between = ((scores[1:] + scores[:-1]) / 2).tolist()

    def mean_layer(threshold: float) -> float:
        return float(ee.replay(trace, Entropy(threshold=threshold))[1].double().mean())

    # more rows leave as the threshold grows
    place = bisect.bisect_left(between, -trace.depth / speed_up, key=lambda threshold: -mean_layer(threshold))
    return Entropy(threshold=between[min(place, len(between) - 1)])
