"""Choose a setting for a target: one function for each target, in `CHOICES`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from earlyexit_kernels.criteria import Criterion
from earlyexit_kernels.tuning.risk import last_passed, risk_p_values
from earlyexit_kernels.tuning.scored import Rows, Setting
from earlyexit_kernels.tuning.tables import parameter_text
from earlyexit_kernels.tuning.targets import Latency, MaxDrop, Risk, SpeedUp, Target

#: Standard errors that `MaxDrop` adds to the loss on the tuning rows, for the settings of one rule and of several: the
#: more settings, the more the fastest of them owes to chance. On draws of 300 rows and more of stored traces the mean
#: loss on other rows is then at most the drop allowed; without a margin it is up to 2.5 times as large.
ONE_RULE, SEVERAL_RULES = 0.5, 1.0
#: Standard errors by which the loss on the check rows may exceed the drop allowed.
DOUBT = 1.0
#: Standard errors by which the score of a slower setting may be below the best one that `SpeedUp` and `Latency` allow:
#: the best of many settings is partly so by chance, and time that is allowed may be used.
TOLERANCE = 1.0


class UnreachableTargetError(ValueError):
    """No setting reaches a target; `nearest` describes the one that misses it least."""

    def __init__(self, target: Target, nearest: str) -> None:
        super().__init__(f"calibrate: no setting reaches {target}; the nearest is {nearest}")
        self.nearest = nearest


class Choice(NamedTuple):
    """A setting, and the number of faster ones that reach the target on the tuning rows and not on the check rows."""

    setting: Setting
    passed_over: int = 0


def _within_drop(target: MaxDrop, candidates: Sequence[Setting], tuning: Rows, checked: Rows, **_: Any) -> Choice:
    """Return the fastest setting that is within the drop on the tuning rows and not contradicted by the check rows."""
    full = tuning.score(tuning.full_depth)
    margin = ONE_RULE if len({s.criterion.name for s in candidates}) == 1 else SEVERAL_RULES

    def bound(setting: Setting) -> float:
        return full - setting.score + margin * setting.standard_error

    within = [s for s in candidates if bound(s) <= target.drop + 1e-9]
    if not within:
        best = min(candidates, key=lambda s: (bound(s), s.mean_exit_layer))
        loss = f"{full - best.score:.4f} plus {margin:g} standard errors of {best.standard_error:.4f}"
        raise UnreachableTargetError(target, f"{_named(best)}, which loses {loss} on {len(tuning)} tuning rows")
    fastest_first = sorted(within, key=lambda s: (s.mean_exit_layer, -s.score))
    for passed_over, setting in enumerate(fastest_first):
        if _doubtless_loss(setting, checked) <= target.drop + 1e-9:
            return Choice(setting, passed_over)
    slowest = fastest_first[-1]
    raise UnreachableTargetError(
        target,
        f"{_named(slowest)}, which loses {_doubtless_loss(slowest, checked):.4f} or more on {len(checked)} check rows",
    )


def _doubtless_loss(setting: Setting, checked: Rows) -> float:
    """Return the loss of a setting on the check rows less `DOUBT` standard errors."""
    ((_, predictions, _),) = checked.replay([setting.criterion])
    full = checked.full_depth
    return checked.score(full) - checked.score(predictions) - DOUBT * checked.standard_error(full, predictions)


def _fast_enough(target: SpeedUp, candidates: Sequence[Setting], tuning: Rows, **_: Any) -> Choice:
    """Return the slowest setting that is fast enough and whose score is within `TOLERANCE` of the best of these."""
    depth = tuning.trace.depth
    kept = [s for s in candidates if depth / s.mean_exit_layer >= target.speed_up - 1e-9]
    if not kept:
        best = min(candidates, key=lambda s: s.mean_exit_layer)
        speed_up = f"a layer speed-up of {depth / best.mean_exit_layer:.2f}"
        raise UnreachableTargetError(target, f"{_named(best)}, with {speed_up}")
    return Choice(_front(kept, lambda s: s.score, tolerance=TOLERANCE)[0])


def _within_latency(
    target: Latency, candidates: Sequence[Setting], tuning: Rows, checked: Rows, timed: Callable[[Criterion], float]
) -> Choice:
    """Return the slowest setting on the front of score against layers that is within the latency, by bisection."""
    front = _front(candidates, lambda s: s.score, tolerance=TOLERANCE)
    low, high = 0, len(front)
    while low < high:
        middle = (low + high) // 2
        if timed(front[middle].criterion) <= target.ms:
            high = middle
        else:
            low = middle + 1
    if low == len(front):
        raise UnreachableTargetError(target, f"{_named(front[-1])}, with {timed(front[-1].criterion):.2f} ms a batch")
    return Choice(front[low])


def _within_risk(target: Risk, candidates: Sequence[Setting], tuning: Rows, checked: Rows, **_: Any) -> Choice:
    """Return the last setting that passes when they are tested from the slowest to the fastest on the check rows."""
    front = _front(candidates, lambda s: -s.risk)
    losses = [checked.lost(predictions) for _, predictions, _ in checked.replay([s.criterion for s in front])]
    last = last_passed(risk_p_values(losses, target.delta), target.epsilon)
    if last is None:
        raise UnreachableTargetError(
            target, f"{_named(front[0])}, whose risk is {losses[0].mean():.4f} on {len(checked)} check rows"
        )
    return Choice(front[last])


def _front(
    candidates: Sequence[Setting], quality: Callable[[Setting], float], *, tolerance: float = 0.0
) -> list[Setting]:
    """Return the settings that are better than every faster one, slowest first.

    Args:
        candidates: the settings.
        quality: of a setting; higher is better.
        tolerance: standard errors by which a setting may be worse than the best faster one.
    """
    ordered = sorted(candidates, key=lambda s: (s.mean_exit_layer, -quality(s)))
    front, best = ordered[:1], ordered[0]
    for setting in ordered[1:]:
        allowed = tolerance * math.hypot(setting.standard_error, best.standard_error)
        if quality(setting) > quality(best) - allowed and setting.mean_exit_layer > front[-1].mean_exit_layer:
            front.append(setting)
        best = max(best, setting, key=quality)
    return front[::-1]


def _named(setting: Setting) -> str:
    """Return a criterion and its setting in words."""
    return ", ".join(filter(None, (setting.criterion.name, parameter_text(setting.criterion))))


#: Target -> ``(target, candidates, *, tuning, checked, timed) -> choice``.
CHOICES: dict[type[Target], Callable[..., Choice]] = {
    MaxDrop: _within_drop,
    SpeedUp: _fast_enough,
    Latency: _within_latency,
    Risk: _within_risk,
}
