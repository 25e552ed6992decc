"""Targets of a calibration: the loss allowed, the speed-up wanted, a latency, or a bound on the risk."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from earlyexit_kernels.arguments import Check, check_fields, choice, number, whole


@dataclass(frozen=True)
class Target:
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
