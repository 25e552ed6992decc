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
    """What the tests know of one criterion; fields after `settings` are for rules.

    Attributes:
        saved: pairs of a criterion and the data that its `to_dict` returns beside ``"name"``, all fields with their
            defaults; the tests read them back. The first criterion is the example of the contract tests.
        refused: constructor arguments, and words of the error, the argument's name first; at least one for each field.
        settings: name -> setting for the tests of the ops; one has the name of the criterion.
        decide: ``(z, aux, state, params, at) -> (leaves, score, distance, answer)``, the oracle's decision of one row
            in float64, a function ``decide_<name>`` of `oracle.py`. `aux` is the row's scalar, `at` the layer and the
            depth, and `state` is changed in place; `score` is the number that is compared, `distance` how far it is
            from the value at which the decision changes.
        draw: ``(draw, C, depth) ->`` a random setting for the tests in `deep`, from `random_settings.py`.
        state: ``(params, C, key of the row) ->`` the oracle's state before layer 1; default: none.
        spreading: ``trace ->`` settings to choose from. Tests of whole models take the one with which the rows leave at
            the most exits, so that compaction has rows to move; `STEPS`, 19 thresholds from 0.05 to 0.95, suit most.
        exits: number of exits, at least, at which rows then leave; 1 for a rule by which no row leaves early.
        variants: further settings for whole models, by name.
        own_answer: whether the answer differs from the exit's logits.
        tolerance: ``(params, score, logits, largest, layers) ->`` maximum error of a float32 score, for the fuzzer;
            `logits` is the error of the logits, `largest` the largest logit and `layers` the number of layers to come.
            A decision whose `distance` is smaller is not compared with the oracle: with too small a tolerance the
            fuzzer reports rounding, and too large a one hides errors. The default, `rounding`, is for scores in [0, 1]
            computed from class probabilities; give another for a score that is larger, that is not computed from
            logits, or that adds up over layers.
        scores: for a criterion whose grid places thresholds, a pair: ``(logits, scalars, criterion) ->`` the numbers
            that a field is compared with, and the name of that field. Logits ``[N, L - 1, C]`` and raw scalars
            ``[N, L - 1]`` by name are those of the exits before the last; the numbers have any shape, float64. Write
            them from the definition, in `grid_scores.py` if they take more than a line, not with the code of the grid.
        covers_costs: whether the grid reaches mean exit layers from 1 to the depth, in steps below 1.6 layers.
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
