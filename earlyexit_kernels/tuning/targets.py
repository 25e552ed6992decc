"""Targets of a calibration: the loss allowed, the speed-up wanted, a latency, or a bound on the risk."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from earlyexit_kernels.arguments import Check, check_fields, choice, number, whole
from earlyexit_kernels.criteria import Criterion
from earlyexit_kernels.tuning.rows import Rows, Setting
from earlyexit_kernels.tuning.tables import parameter_text

#: Standard errors that `MaxDrop` adds to the loss on the tuning rows, for the settings of one rule and of several: the
#: more settings, the more the fastest of them owes to chance. On draws of 300 rows and more of stored traces the mean
#: loss on other rows is then at most the drop allowed; without a margin it is up to 2.5 times as large.
ONE_RULE, SEVERAL_RULES = 0.5, 1.0
#: Standard errors by which the loss on the check rows may exceed the drop allowed.
DOUBT = 1.0
#: Standard errors by which the score of a slower setting may be below the best one that `SpeedUp` and `Latency` allow:
#: the best of many settings is partly so by chance, and time that is allowed may be used.
TOLERANCE = 1.0
#: Times that the search for a threshold of each layer goes through the layers.
ROUNDS = 2


class UnreachableTargetError(ValueError):
    """No setting reaches a target; `nearest` describes the one that misses it least."""

    def __init__(self, target: Target, nearest: str) -> None:
        super().__init__(f"calibrate: no setting reaches {target}; the nearest is {nearest}")
        self.nearest = nearest


class Choice(NamedTuple):
    """A setting, and the number of faster ones that reach the target on the tuning rows and not on the check rows."""

    setting: Setting
    passed_over: int = 0


@dataclass(frozen=True)
class Target(ABC):
    """Base class of the targets.

    Class attributes:
        name: in the saved calibration.
        checks: check of each field, by name.
    """

    name: ClassVar[str]
    checks: ClassVar[Mapping[str, Check]] = {}

    def __post_init__(self) -> None:
        check_fields(self, self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return {"name": self.name, **asdict(self)}

    @abstractmethod
    def choose(
        self,
        candidates: Sequence[Setting],
        *,
        tuning: Rows,
        checked: Rows,
        timed: Callable[[Criterion], float] | None = None,
    ) -> Choice:
        """Return the choice among some settings.

        Args:
            candidates: the settings, with their results on the tuning rows.
            tuning, checked: rows to choose on, and others.
            timed: returns the milliseconds of a batch under a criterion, for `Latency`.

        Raises:
            UnreachableTargetError: no setting reaches the target.
        """


@dataclass(frozen=True)
class MaxDrop(Target):
    """Choose the fastest setting that loses at most `drop`.

    The loss on the tuning rows plus a margin must be at most `drop`: the fastest of many settings is partly so by
    chance, and would otherwise lose more than `drop` on other rows. The margin is half a standard error for the
    settings of one rule, and one for those of several. A setting that loses more than `drop` on the check rows, by
    more than a standard error, is passed over for the next slower one. On other rows the loss is then at most `drop` on
    average over draws of 300 tuning rows or more; `Risk` bounds it for one draw.

    Attributes:
        drop: maximum loss of the metric against full depth, in [0, 0.5]; 0.005 is half a point of accuracy.

    >>> import earlyexit_kernels as ee
    >>> ee.MaxDrop(0.005)
    MaxDrop(drop=0.005)
    """

    drop: float

    name: ClassVar[str] = "max_drop"
    checks: ClassVar[Mapping[str, Check]] = {"drop": number(low=0.0, high=0.5)}

    def choose(self, candidates: Sequence[Setting], *, tuning: Rows, checked: Rows, **_: Any) -> Choice:
        """Return the fastest setting within the drop on the tuning rows that the check rows do not contradict."""
        full = tuning.score(tuning.full_depth)
        margin = ONE_RULE if len({s.criterion.name for s in candidates}) == 1 else SEVERAL_RULES

        def bound(setting: Setting) -> float:
            return full - setting.score + margin * setting.standard_error

        within = [s for s in candidates if bound(s) <= self.drop + 1e-9]
        if not within:
            best = min(candidates, key=lambda s: (bound(s), s.mean_exit_layer))
            loss = f"{full - best.score:.4f} plus {margin:g} standard errors of {best.standard_error:.4f}"
            raise UnreachableTargetError(self, f"{_named(best)}, which loses {loss} on {len(tuning)} tuning rows")
        fastest_first = sorted(within, key=lambda s: (s.mean_exit_layer, -s.score))
        for passed_over, setting in enumerate(fastest_first):
            if _doubtless_loss(setting, checked) <= self.drop + 1e-9:
                return Choice(setting, passed_over)
        slowest = fastest_first[-1]
        loss = f"{_doubtless_loss(slowest, checked):.4f} or more"
        raise UnreachableTargetError(self, f"{_named(slowest)}, which loses {loss} on {len(checked)} check rows")


@dataclass(frozen=True)
class SpeedUp(Target):
    """Choose the setting with the highest score among those that run 1 / `speed_up` of the layers, or fewer.

    Of the settings whose scores are within one standard error of the highest, the slowest is chosen: the best of many
    settings is partly so by chance.

    Attributes:
        speed_up: L / mean exit layer, at least 1.

    >>> import earlyexit_kernels as ee
    >>> ee.SpeedUp(2.0)
    SpeedUp(speed_up=2.0)
    """

    speed_up: float

    name: ClassVar[str] = "speed_up"
    checks: ClassVar[Mapping[str, Check]] = {"speed_up": number(low=1.0)}

    def choose(self, candidates: Sequence[Setting], *, tuning: Rows, **_: Any) -> Choice:
        """Return the slowest setting that is fast enough and whose score is within `TOLERANCE` of the best of these."""
        depth = tuning.trace.depth
        kept = [s for s in candidates if depth / s.mean_exit_layer >= self.speed_up - 1e-9]
        if not kept:
            best = min(candidates, key=lambda s: s.mean_exit_layer)
            speed_up = f"a layer speed-up of {depth / best.mean_exit_layer:.2f}"
            raise UnreachableTargetError(self, f"{_named(best)}, with {speed_up}")
        return Choice(_front(kept, lambda s: s.score, tolerance=TOLERANCE)[0])


@dataclass(frozen=True)
class Latency(Target):
    """Choose the setting with the highest score among those whose batches take at most `ms`, measured on this machine.

    Of the settings whose scores are within one standard error of the highest, the slowest is chosen, as for `SpeedUp`.

    Attributes:
        ms: milliseconds, the median over batches of the tuning rows.
        batch_size: rows per batch.

    >>> import earlyexit_kernels as ee
    >>> ee.Latency(ms=8, batch_size=4)
    Latency(ms=8.0, batch_size=4)
    """

    ms: float
    batch_size: int = 1

    name: ClassVar[str] = "latency"
    checks: ClassVar[Mapping[str, Check]] = {"ms": number(low=0.0), "batch_size": whole(low=1)}

    def choose(self, candidates: Sequence[Setting], *, timed: Any = None, **_: Any) -> Choice:
        """Return the slowest setting on the front of score against layers that is within the latency, by bisection."""
        front = _front(candidates, lambda s: s.score, tolerance=TOLERANCE)
        low, high = 0, len(front)
        while low < high:
            middle = (low + high) // 2
            if timed(front[middle].criterion) <= self.ms:
                high = middle
            else:
                low = middle + 1
        if low == len(front):
            raise UnreachableTargetError(self, f"{_named(front[-1])}, with {timed(front[-1].criterion):.2f} ms a batch")
        return Choice(front[low])


@dataclass(frozen=True)
class Risk(Target):
    """Choose the fastest setting whose risk is at most `delta` with probability 1 - `epsilon`, for any distribution.

    Learn then test (Angelopoulos et al., arXiv 2110.01052), as CALM (Schuster et al., NeurIPS 2022) uses it: the
    settings found on the tuning rows are tested on the check rows from the slowest to the fastest, each with the
    Hoeffding-Bentkus p-value of "the risk exceeds `delta`", until one p-value exceeds `epsilon`; the last setting
    before it is chosen. The guarantee requires that rows are drawn independently from one distribution.

    Attributes:
        delta: bound on the risk, in (0, 1).
        epsilon: maximum probability, over the draw of the check rows, that the risk exceeds `delta`, in (0, 1).
        against: ``"labels"``: the risk is the share of rows that full depth answers correctly and the criterion does
            not, at least the drop in accuracy; ``"full_depth"``: the share of rows with another answer than full depth,
            for which no labels are needed.

    >>> import earlyexit_kernels as ee
    >>> ee.Risk(delta=0.01).rows_needed
    299
    """

    delta: float
    epsilon: float = 0.05
    against: str = "labels"

    name: ClassVar[str] = "risk"
    checks: ClassVar[Mapping[str, Check]] = {
        "delta": number(low=0.0, high=1.0, inside=True),
        "epsilon": number(low=0.0, high=1.0, inside=True),
        "against": choice("labels", "full_depth"),
    }

    @property
    def rows_needed(self) -> int:
        """Number of check rows with which a setting without any loss passes: (1 - delta)^n <= epsilon."""
        return math.ceil(math.log(self.epsilon) / math.log1p(-self.delta))

    def choose(self, candidates: Sequence[Setting], *, tuning: Rows, checked: Rows, **_: Any) -> Choice:
        """Return the last setting that passes on the check rows, tested from the slowest to the fastest."""
        front = _front(candidates, lambda s: -s.risk)
        answers = checked.replay([s.criterion for s in front])
        losses = [checked.lost(checked.predictions(a)) for a in answers]
        last = last_passed(risk_p_values(losses, self.delta), self.epsilon)
        if last is None:
            raise UnreachableTargetError(
                self, f"{_named(front[0])}, whose risk is {losses[0].mean():.4f} on {len(checked)} check rows"
            )
        return Choice(front[last])

    def check_rows(self, rows: int, total: int) -> None:
        """Refuse fewer check rows, of some rows in total, than any guarantee requires.

        Raises:
            ValueError: names the number needed.
        """
        if rows < self.rows_needed:
            needed = math.ceil(self.rows_needed * total / rows)
            raise ValueError(
                f"{self}: expected at least {self.rows_needed} check rows, with which a setting without any loss "
                f"passes, got {rows} of {total} rows; give at least {needed} rows that the model was not trained on, "
                "or a larger delta or epsilon"
            )


def _doubtless_loss(setting: Setting, checked: Rows) -> float:
    """Return the loss of a setting on the check rows less `DOUBT` standard errors."""
    predictions, full = checked.predictions(*checked.replay([setting.criterion])), checked.full_depth
    return checked.score(full) - checked.score(predictions) - DOUBT * checked.standard_error(full, predictions)


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


def risk_p_values(losses: Sequence[NDArray], delta: float) -> NDArray:
    """Return the Hoeffding-Bentkus p-values of "the risk exceeds `delta`", ``[S]``.

    Args:
        losses: S arrays ``[N]`` of 0 and 1.
        delta: bound on the risk, in (0, 1).

    Raises:
        ImportError: MAPIE is not installed.
    """
    try:
        from mapie.risk_control.methods import compute_hoeffding_bentkus_p_value
    except ImportError as error:
        raise ImportError("Risk requires MAPIE: `pip install mapie`") from error
    means = np.array([values.mean() for values in losses], dtype=np.float64)
    return compute_hoeffding_bentkus_p_value(means, len(losses[0]), delta, binary=True)[:, 0]


def last_passed(p_values: NDArray, epsilon: float) -> int | None:
    """Return the index of the last hypothesis that fixed-sequence testing rejects, or None if the first one stays.

    Args:
        p_values: ``[S]`` in testing order.
        epsilon: family-wise error rate.
    """
    from mapie.risk_control import control_fwer

    rejected = control_fwer(p_values, epsilon, fwer_method="fixed_sequence")
    return int(rejected.max()) if len(rejected) else None


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
