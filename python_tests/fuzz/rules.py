"""Random settings of every exit rule: the criterion, its plain numbers for the oracle, and how far rounding goes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from earlyexit_kernels import criteria
from fuzz.case import Case

EPS = 2.0**-23


@dataclasses.dataclass(frozen=True)
class Rule:
    """A criterion with one setting.

    Attributes:
        name: of the oracle's decision.
        criterion: of the package.
        numbers: ``layer -> the oracle's params``.
        scale: its scalars lie in [0, scale].
    """

    name: str
    criterion: criteria.Criterion
    numbers: Callable[[int], Any]
    scale: float = 1.0


def _threshold(case: Case, depth: int, low: float, high: float) -> tuple[Any, Callable[[int], float]]:
    """A threshold for all layers, or one for each exit before the last; and the number at a layer."""

    def one() -> float:
        return case.choice((low, high)) if case.chance(0.05) else case.uniform(low, high)

    if depth > 1 and case.chance(0.3):
        each = [one() for _ in range(depth - 1)]
        return each, lambda layer: (*each, each[-1])[layer - 1]
    value = one()
    return value, lambda layer: value


def _simple(name: str, build: Any, low: float, high: float, scale: float = 1.0) -> Callable[[Case, int, int], Rule]:
    def make(case: Case, classes: int, depth: int) -> Rule:
        given, at = _threshold(case, depth, low, high)
        return Rule(name, build(threshold=given), lambda layer: (at(layer),), scale)

    return make


def _entropy(case: Case, classes: int, depth: int) -> Rule:
    normalized = case.chance(0.4)
    given, at = _threshold(case, depth, 0.0, 1.0 if normalized else math.log(classes))
    criterion = criteria.Entropy(threshold=given, normalized=normalized)
    return Rule("entropy", criterion, lambda layer: (at(layer), normalized))


def _patience(case: Case, classes: int, depth: int) -> Rule:
    patience = case.integer(1, max(1, depth - 1))
    tolerance = case.uniform(0.01, 3) if classes == 1 else None
    criterion = criteria.Patience(patience=patience, tolerance=tolerance)
    return Rule("patience", criterion, lambda layer: (patience, tolerance))


def _q_exit(case: Case, classes: int, depth: int) -> Rule:
    q = case.choice((0.0, 1.0, case.uniform(0, 1), case.uniform(0, 1)))
    return Rule("q_exit", criteria.QExit(q=q), lambda layer: (q,), case.choice((0.3, 1.0)))


def _sampled_exit(case: Case, classes: int, depth: int) -> Rule:
    seed = case.draw.getrandbits(63)
    return Rule("sampled_exit", criteria.SampledExit(seed=seed), lambda layer: (seed,), 0.5)


def _voting(case: Case, classes: int, depth: int) -> Rule:
    threshold: float = case.choice((float(case.integer(0, depth + 1)), case.uniform(0, depth)))
    gamma, final = case.choice((0.0, 0.5, 1.0, case.uniform(0, 1))), case.choice(("vote", "last"))
    criterion = criteria.Voting(threshold=threshold, gamma=gamma, final=final)
    return Rule("voting", criterion, lambda layer: (threshold, gamma, final))


def _dact(case: Case, classes: int, depth: int) -> Rule:
    bound, epsilon = case.choice(("paper", "tight")), case.choice((0.0, 0.0, case.uniform(0, 1)))
    criterion = criteria.Dact(bound=bound, epsilon=epsilon)
    return Rule("dact", criterion, lambda layer: (bound, epsilon), case.choice((0.5, 1.0)))


def _patient(name: str, build: Any, high: float) -> Callable[[Case, int, int], Rule]:
    def make(case: Case, classes: int, depth: int) -> Rule:
        exponent = case.choice((0, -3, -6, -8)) if name == "divergence_patience" else 0
        given, at = _threshold(case, depth, 0.0, high * 10.0**exponent)
        patience = case.integer(1, max(1, depth - 1))
        return Rule(name, build(threshold=given, patience=patience), lambda layer: (at(layer), patience))

    return make


#: Rule -> how to draw a setting for ``(case, classes, depth)``.
DRAWN: dict[str, Callable[[Case, int, int], Rule]] = {
    "full_depth": lambda case, classes, depth: Rule("full_depth", criteria.FullDepth(), lambda layer: ()),
    "entropy": _entropy,
    "max_probability": _simple("max_probability", criteria.MaxProbability, 0.0, 1.0),
    "margin": _simple("margin", criteria.Margin, 0.0, 1.0),
    "patience": _patience,
    "q_exit": _q_exit,
    "sampled_exit": _sampled_exit,
    "expectation": lambda case, classes, depth: Rule("expectation", criteria.Expectation(), lambda layer: (), 0.5),
    "voting": _voting,
    "dact": _dact,
    "learned": _simple("learned", criteria.Learned, 0.0, 1.0),
    "patient_confidence": _patient("patient_confidence", criteria.PatientConfidence, 1.0),
    "divergence_patience": _patient("divergence_patience", criteria.DivergencePatience, math.log(2)),
    "hidden_cosine": _simple("hidden_cosine", criteria.HiddenCosine, -1.0, 1.0),
    "energy": _simple("energy", criteria.Energy, 0.0, 1.0),
}
#: Rules that are defined for one output too.
ONE_OUTPUT = ("full_depth", "patience", "q_exit", "sampled_exit", "expectation", "learned", "hidden_cosine")


def score_tolerance(name: str, params: Any, score: float, logits: float, largest: float, layers: int) -> float:
    """How far the float32 score of a row may lie from the exact one.

    Args:
        name, params: of the oracle's decision.
        score: of the row, exact.
        logits: how far each of its logits may be off.
        largest: the largest finite logit of the row, in absolute value.
        layers: still to come, for rules that look ahead.
    """
    if name in ("full_depth", "expectation"):
        return 0.0
    if name == "voting":
        return 2 * logits
    if name == "patience":
        # the tolerance is compared as float32
        return 2 * logits if params[1] is None else 2 * logits + 4 * EPS * (largest + params[1])
    if name in ("learned", "hidden_cosine"):
        return EPS * abs(params[0])
    if name in ("q_exit", "sampled_exit"):
        return 1e-6
    if name == "divergence_patience":
        # of two probabilities with a relative error of rounding
        return 4 * logits + 6e-6 * math.sqrt(max(score, 0.0)) + 1e-12 + EPS * params[0]
    if name == "dact":
        return 4e-6 * (1 + layers) + 4 * logits
    if name == "entropy":
        return (4e-6 + 3 * logits) * 8
    return 4e-6 + 3 * logits
