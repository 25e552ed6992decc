"""Random settings of criteria for the fuzzer: a criterion, and its plain numbers for the oracle."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Protocol

from earlyexit_kernels import criteria


class Draws(Protocol):
    """The random numbers of a fuzz case; see `fuzz.case.Case`."""

    draw: Any

    def chance(self, probability: float) -> bool: ...
    def choice(self, values: Any) -> Any: ...
    def integer(self, low: int, high: int) -> int: ...
    def uniform(self, low: float, high: float) -> float: ...


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A criterion with one random setting.

    Attributes:
        criterion: of the package.
        numbers: ``layer -> params`` of the oracle.
        scale: scalars of the heads are drawn from [0, scale].
    """

    criterion: criteria.Criterion
    numbers: Callable[[int], Any]
    scale: float = 1.0

    @property
    def name(self) -> str:
        return self.criterion.name


#: ``(random numbers, classes, depth) -> setting``.
Draw = Callable[[Draws, int, int], Drawn]


def _threshold(case: Draws, depth: int, low: float, high: float) -> tuple[Any, Callable[[int], float]]:
    """Draw one threshold, or one for each exit before the last; return it and the number at a layer."""

    def one() -> float:
        return case.choice((low, high)) if case.chance(0.05) else case.uniform(low, high)

    if depth > 1 and case.chance(0.3):
        each = [one() for _ in range(depth - 1)]
        return each, lambda layer: (*each, each[-1])[layer - 1]
    value = one()
    return value, lambda layer: value


def without_fields(build: Any, scale: float = 1.0) -> Draw:
    """Draw settings of a criterion without fields."""
    return lambda case, classes, depth: Drawn(build(), lambda layer: (), scale)


def thresholds(build: Any, low: float = 0.0, high: float = 1.0) -> Draw:
    """Draw settings of a criterion with a threshold only."""

    def draw(case: Draws, classes: int, depth: int) -> Drawn:
        given, at = _threshold(case, depth, low, high)
        return Drawn(build(threshold=given), lambda layer: (at(layer),))

    return draw


def thresholds_and_patience(build: Any, high: float = 1.0, exponents: tuple[int, ...] = (0,)) -> Draw:
    """Draw settings of a criterion with a threshold, scaled by a power of 10, and a patience."""

    def draw(case: Draws, classes: int, depth: int) -> Drawn:
        exponent = case.choice(exponents) if len(exponents) > 1 else exponents[0]
        given, at = _threshold(case, depth, 0.0, high * 10.0**exponent)
        patience = case.integer(1, max(1, depth - 1))
        return Drawn(build(threshold=given, patience=patience), lambda layer: (at(layer), patience))

    return draw


def entropy(case: Draws, classes: int, depth: int) -> Drawn:
    normalized = case.chance(0.4)
    given, at = _threshold(case, depth, 0.0, 1.0 if normalized else math.log(classes))
    criterion = criteria.Entropy(threshold=given, normalized=normalized)
    return Drawn(criterion, lambda layer: (at(layer), normalized))


def patience(case: Draws, classes: int, depth: int) -> Drawn:
    count = case.integer(1, max(1, depth - 1))
    tolerance = case.uniform(0.01, 3) if classes == 1 else None
    return Drawn(criteria.Patience(patience=count, tolerance=tolerance), lambda layer: (count, tolerance))


def q_exit(case: Draws, classes: int, depth: int) -> Drawn:
    q = case.choice((0.0, 1.0, case.uniform(0, 1), case.uniform(0, 1)))
    return Drawn(criteria.QExit(q=q), lambda layer: (q,), case.choice((0.3, 1.0)))


def sampled_exit(case: Draws, classes: int, depth: int) -> Drawn:
    seed = case.draw.getrandbits(63)
    return Drawn(criteria.SampledExit(seed=seed), lambda layer: (seed,), 0.5)


def voting(case: Draws, classes: int, depth: int) -> Drawn:
    threshold: float = case.choice((float(case.integer(0, depth + 1)), case.uniform(0, depth)))
    gamma, final = case.choice((0.0, 0.5, 1.0, case.uniform(0, 1))), case.choice(("vote", "last"))
    criterion = criteria.Voting(threshold=threshold, gamma=gamma, final=final)
    return Drawn(criterion, lambda layer: (threshold, gamma, final))


def dact(case: Draws, classes: int, depth: int) -> Drawn:
    bound, epsilon = case.choice(("paper", "tight")), case.choice((0.0, 0.0, case.uniform(0, 1)))
    criterion = criteria.Dact(bound=bound, epsilon=epsilon)
    return Drawn(criterion, lambda layer: (bound, epsilon), case.choice((0.5, 1.0)))
