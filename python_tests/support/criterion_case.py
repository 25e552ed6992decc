"""What the tests and the fuzzer know of one criterion: the row of `criterion_cases` and its settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from support import random_settings

from earlyexit_kernels.criteria import Criterion
from earlyexit_kernels.types import ExitTrace

EPS = 2.0**-23


@dataclasses.dataclass(frozen=True)
class Setting:
    """A criterion with one setting, for the tests of the ops, which have four layers.

    Attributes:
        build: ``C -> Criterion``.
        numbers: ``(C, layer) ->`` the params of the oracle.
        classes: class counts C that it is tested with.
        scale: scalars of the heads are drawn from [0, scale].
        exact: whether decisions on given logits involve no rounding.
    """

    build: Callable[[int], Criterion]
    numbers: Callable[[int, int], Any]
    classes: tuple[int, ...] = (2, 3, 17)
    scale: float = 0.5
    exact: bool = False


def fixed(criterion: Criterion, *numbers: Any, **others: Any) -> Setting:
    """A setting that does not depend on classes and layer."""
    return Setting(lambda c: criterion, lambda c, layer: numbers, **others)


def no_state(params: Any, classes: int, key: int) -> list[float]:
    return []


def rounding(params: Any, score: float, logits: float, largest: float, layers: int) -> float:
    """Error of a float32 score that is computed from probabilities."""
    return 4e-6 + 3 * logits


@dataclasses.dataclass(frozen=True)
class Case:
    """What the tests know of one criterion; the fields after `settings` may be left out for one that wraps a rule.

    Attributes:
        saved: criteria and the data of their `to_dict`; the first one is the example of the contract tests.
        refused: constructor arguments, and words of the error, the argument's name first.
        settings: name -> setting for the tests of the ops.
        decide: the oracle's decision of a row in float64.
        draw: a random setting for the fuzzer.
        state: ``(params, C, key of the row) ->`` the oracle's state before layer 1.
        spreading: ``trace ->`` settings of which one lets the rows leave at many exits.
        exits: number of exits, at least, at which rows then leave; 1 for a rule by which no row leaves early.
        variants: further settings for whole models, by name.
        own_answer: whether the answer differs from the exit's logits.
        tolerance: error of a float32 score, from the oracle's params and score, the error of the logits, the largest
            logit and the number of layers to come.
        scores: ``(logits, scalars, criterion) ->`` the numbers that a field is compared with, and that field; for
            criteria whose grid lays out thresholds.
        covers_costs: whether the grid covers mean exit layers from 1 to the depth.
    """

    saved: Sequence[tuple[Criterion, dict[str, Any]]]
    refused: Sequence[tuple[dict[str, Any], tuple[str, ...]]] = ()
    settings: Mapping[str, Setting] = dataclasses.field(default_factory=dict)
    decide: Callable[..., Any] | None = None
    draw: random_settings.Draw | None = None
    state: Callable[[Any, int, int], list[float]] = no_state
    spreading: Callable[[ExitTrace], Sequence[Criterion]] | None = None
    exits: int = 2
    variants: Mapping[str, Criterion] = dataclasses.field(default_factory=dict)
    own_answer: bool = False
    tolerance: Callable[[Any, float, float, float, int], float] = rounding
    scores: tuple[Callable[..., Any], str] | None = None
    covers_costs: bool = True
