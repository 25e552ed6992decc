"""Wall-clock comparisons that survive a noisy machine: alternatives take turns, and are compared round by round."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm.auto import tqdm


@dataclass(frozen=True)
class Ratio:
    """Time of one alternative over that of another, from rounds in which both ran.

    Attributes:
        median: of the per-round ratios; 0.5 means half the time.
        low, high: their 0.2 and 0.8 quantiles.
    """

    median: float
    low: float
    high: float

    @property
    def saved(self) -> float:
        """Share of the time saved, 1 - median; negative where it got slower."""
        return 1.0 - self.median

    def fields(self) -> dict[str, float]:
        """As a record of a measurement holds it: ratio, ratio_low and ratio_high, to four places."""
        values = {"ratio": self.median, "ratio_low": self.low, "ratio_high": self.high}
        return {name: round(value, 4) for name, value in values.items()}

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def interleave(
    alternatives: Mapping[str, Callable[[], Any]],
    *,
    repeats: int = 20,
    warmup: int = 3,
    sync: Callable[[], None] | None = None,
    prepare: Callable[[str], None] | None = None,
    clock: Callable[[Callable[[], Any]], float] | None = None,
    seed: int = 0,
    progress: str | None = None,
) -> dict[str, list[float]]:
    """Time alternatives in rounds: every round calls each of them once, in an order drawn anew.

    A slow spell of the machine then hits all of them alike, and cancels in `paired_ratio`.

    Args:
        alternatives: name -> what to time, called without arguments.
        repeats: timed rounds.
        warmup: untimed rounds before them.
        sync: waits for work queued on a device, e.g. `torch.cuda.synchronize`; called before each clock reading.
        prepare: called with an alternative's name before each of its calls, untimed: restores what the call changes.
        clock: makes a call and gives its milliseconds, e.g. by a device's events; default: the wall clock, with `sync`.
        seed: of the orders.
        progress: title of a progress bar; None shows none.

    Returns:
        name -> milliseconds of each round; the lists share their indices.

    Raises:
        ValueError: nothing to time, or no repeats.
    """
    if not alternatives or repeats < 1 or warmup < 0:
        raise ValueError(
            "interleave: expected at least one alternative, repeats >= 1 and warmup >= 0, "
            f"got {len(alternatives)}, {repeats} and {warmup}"
        )
    shuffle = random.Random(seed).shuffle
    order = list(alternatives)
    times: dict[str, list[float]] = {name: [] for name in alternatives}
    for turn in tqdm(range(warmup + repeats), desc=progress, disable=progress is None, leave=False):
        shuffle(order)
        for name in order:
            if prepare is not None:
                prepare(name)
            elapsed = _milliseconds(alternatives[name], sync) if clock is None else clock(alternatives[name])
            if turn >= warmup:
                times[name].append(elapsed)
    return times


def _milliseconds(call: Callable[[], Any], sync: Callable[[], None] | None) -> float:
    if sync is not None:
        sync()
    start = time.perf_counter_ns()
    call()
    if sync is not None:
        sync()
    return (time.perf_counter_ns() - start) / 1e6


def quantiles(values: Sequence[float], at: Sequence[float] = (0.2, 0.5, 0.8)) -> tuple[float, ...]:
    """Quantiles of some numbers, linear between neighbours.

    Raises:
        ValueError: no numbers.
    """
    if not len(values):
        raise ValueError("quantiles: expected at least one number, got none")
    return tuple(float(q) for q in np.quantile(np.asarray(values, dtype=np.float64), at))


def paired_ratio(times: Sequence[float], baseline: Sequence[float]) -> Ratio:
    """Compare two alternatives of one `interleave` call, round by round.

    Raises:
        ValueError: the lists differ in length or are empty.
    """
    if len(times) != len(baseline) or not len(times):
        raise ValueError(
            f"paired_ratio: expected two lists of equal length from one run, got {len(times)} and {len(baseline)} times"
        )
    low, median, high = quantiles([a / b for a, b in zip(times, baseline, strict=True)])
    return Ratio(median=median, low=low, high=high)
