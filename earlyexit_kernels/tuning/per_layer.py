"""Thresholds for each layer by greedy search: one layer's threshold is changed at a time, as long as that is better."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from earlyexit_kernels.criteria import Criterion
from earlyexit_kernels.tuning.choices import Choice
from earlyexit_kernels.tuning.scored import Rows, Setting

#: Times that the search goes through the layers.
ROUNDS = 2


def refine(
    start: Choice, candidates: Sequence[Setting], tuning: Rows, choose: Callable[[Sequence[Setting]], Choice]
) -> Choice:
    """Return the choice that a greedy search over the thresholds of each layer ends at.

    Args:
        start: the setting chosen with one threshold for all layers.
        candidates: the settings that it was chosen from; their thresholds are tried at each layer.
        tuning: the rows to choose on.
        choose: returns the best of some settings, of which `start` is one.

    Raises:
        ValueError: the rule has no thresholds for each layer.
    """
    depth, rule = tuning.trace.depth, start.setting.criterion
    thresholds = [t for s in candidates if _differs_in_threshold(s.criterion, rule) for t in _each(s.criterion, depth)]
    found = start
    for _ in range(ROUNDS):
        before = found
        for layer in range(depth - 1):
            current = _each(found.setting.criterion, depth)
            changed = [
                dataclasses.replace(rule, threshold=(*current[:layer], t, *current[layer + 1 :]))  # type: ignore[call-arg]
                for t in dict.fromkeys(thresholds)
                if t != current[layer]
            ]
            found = choose([found.setting, *tuning.settings(changed)])
        if found == before:
            break
    return found


def _each(criterion: Criterion, depth: int) -> tuple[Any, ...]:
    """Return the threshold of each layer before the last one.

    Raises:
        ValueError: the rule has no thresholds for each layer.
    """
    threshold = getattr(criterion, "threshold", None)
    each = threshold if isinstance(threshold, tuple) else (threshold,) * (depth - 1)
    try:
        dataclasses.replace(criterion, threshold=each)  # type: ignore[call-arg]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"calibrate: per_layer=True requires a rule with a threshold for each layer, such as 'entropy', got "
            f"{criterion.name!r}"
        ) from error
    return each


def _differs_in_threshold(criterion: Criterion, other: Criterion) -> bool:
    """Return whether two settings of one rule differ in nothing but the threshold."""
    first, second = ({k: v for k, v in c.to_dict().items() if k != "threshold"} for c in (criterion, other))
    return first == second
