"""Random settings of criteria for the deep tests: a criterion, and its plain numbers for the oracle."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

from earlyexit_kernels import criteria


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A criterion with one random setting.

    Attributes:
        criterion: of the package.
        numbers: ``layer -> params`` of the oracle.
        scale: scalars of the heads are drawn from [0, scale].
    """

    criterion: criteria.Criterion
    numbers: Callable[[int], Any] = dataclasses.field(repr=False)
    scale: float = 1.0

    @property
    def name(self) -> str:
        return self.criterion.name


#: ``(draw, classes, depth) -> setting``; `draw` is that of `hypothesis.strategies.composite`.
Draw = Callable[[Any, int, int], Drawn]


def chance(draw: Any, percent: int) -> bool:
    """Return True in so many of a hundred cases, and False in the simplest one."""
    return draw(st.integers(0, 99)) >= 100 - percent


def choice(draw: Any, values: Sequence[Any]) -> Any:
    """Return one of `values`, the first in the simplest case."""
    return draw(st.sampled_from(values))


def uniform(draw: Any, low: float, high: float) -> float:
    """Return a number in ``[low, high]``; the ends are drawn more often."""
    return draw(st.floats(low, high, allow_subnormal=False))


def _threshold(draw: Any, depth: int, low: float, high: float) -> tuple[Any, Callable[[int], float]]:
    """Draw one threshold, or one for each exit before the last; return it and the number at a layer."""
    if depth > 1 and chance(draw, 30):
        thresholds = [uniform(draw, low, high) for _ in range(depth - 1)]
        return thresholds, lambda layer: (*thresholds, thresholds[-1])[layer - 1]
    value = uniform(draw, low, high)
    return value, lambda layer: value


def without_fields(build: Any, scale: float = 1.0) -> Draw:
    """Draw settings of a criterion without fields."""
    return lambda draw, classes, depth: Drawn(build(), lambda layer: (), scale)


def fixed_layer(draw: Any, classes: int, depth: int) -> Drawn:
    layer = draw(st.integers(1, depth + 1))
    return Drawn(criteria.FixedLayer(layer=layer), lambda at: (layer,))


def thresholds(build: Any, low: float = 0.0, high: float = 1.0) -> Draw:
    """Draw settings of a criterion with a threshold only."""

    def drawn(draw: Any, classes: int, depth: int) -> Drawn:
        threshold, at = _threshold(draw, depth, low, high)
        return Drawn(build(threshold=threshold), lambda layer: (at(layer),))

    return drawn


def thresholds_and_patience(build: Any, high: float = 1.0, exponents: tuple[int, ...] = (0,)) -> Draw:
    """Draw settings of a criterion with a threshold, scaled by a power of 10, and a patience."""

    def drawn(draw: Any, classes: int, depth: int) -> Drawn:
        threshold, at = _threshold(draw, depth, 0.0, high * 10.0 ** choice(draw, exponents))
        patience = draw(st.integers(1, max(1, depth - 1)))
        return Drawn(build(threshold=threshold, patience=patience), lambda layer: (at(layer), patience))

    return drawn


def entropy(draw: Any, classes: int, depth: int) -> Drawn:
    normalized = chance(draw, 40)
    threshold, at = _threshold(draw, depth, 0.0, 1.0 if normalized else math.log(classes))
    criterion = criteria.Entropy(threshold=threshold, normalized=normalized)
    return Drawn(criterion, lambda layer: (at(layer), normalized))


def patience(draw: Any, classes: int, depth: int) -> Drawn:
    count = draw(st.integers(1, max(1, depth - 1)))
    tolerance = uniform(draw, 0.01, 3) if classes == 1 else None
    return Drawn(criteria.Patience(patience=count, tolerance=tolerance), lambda layer: (count, tolerance))


def q_exit(draw: Any, classes: int, depth: int) -> Drawn:
    q = uniform(draw, 0, 1)
    return Drawn(criteria.QExit(q=q), lambda layer: (q,), choice(draw, (0.3, 1.0)))


def sampled_exit(draw: Any, classes: int, depth: int) -> Drawn:
    seed = draw(st.integers(0, 2**63 - 1))
    return Drawn(criteria.SampledExit(seed=seed), lambda layer: (seed,), 0.5)


def voting(draw: Any, classes: int, depth: int) -> Drawn:
    threshold = float(draw(st.integers(0, depth + 1))) if chance(draw, 50) else uniform(draw, 0, depth)
    gamma, final = choice(draw, (0.5, uniform(draw, 0, 1))), choice(draw, ("vote", "last"))
    criterion = criteria.Voting(threshold=threshold, gamma=gamma, final=final)
    return Drawn(criterion, lambda layer: (threshold, gamma, final))


def dact(draw: Any, classes: int, depth: int) -> Drawn:
    bound, epsilon = choice(draw, ("paper", "tight")), 0.0 if chance(draw, 60) else uniform(draw, 0, 1)
    criterion = criteria.Dact(bound=bound, epsilon=epsilon)
    return Drawn(criterion, lambda layer: (bound, epsilon), choice(draw, (0.5, 1.0)))
