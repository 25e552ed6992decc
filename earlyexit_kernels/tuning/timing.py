"""Compare wall-clock times on a noisy machine: alternatives take turns and are compared round by round."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from earlyexit_kernels.criteria import Criterion
from earlyexit_kernels.hf.predict import INPUTS, PadRight

#: Batches that are timed.
BATCHES = 30


@dataclass(frozen=True)
class Ratio:
    """Ratio of the times of two alternatives, from rounds in which both ran.

    Attributes:
        median: median of the per-round ratios; 0.5 means half the time.
        low, high: 0.2 and 0.8 quantiles of the per-round ratios.
    """

    median: float
    low: float
    high: float

    @property
    def saved(self) -> float:
        """Share of the time saved, 1 - median; negative if slower."""
        return 1.0 - self.median

    def fields(self) -> dict[str, float]:
        """Return ratio, ratio_low and ratio_high for a JSON record, rounded to four places."""
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
    """Time alternatives in rounds: every round calls each of them once, in random order.

    A slow phase of the machine then affects all of them alike and cancels in `paired_ratio`.

    Args:
        alternatives: name -> function to time, called without arguments.
        repeats: number of timed rounds.
        warmup: number of untimed rounds before them.
        sync: waits for work queued on a device, e.g. `torch.cuda.synchronize`; called before each clock reading.
        prepare: called with the name of an alternative before each of its calls, untimed.
        clock: runs a function and returns its milliseconds, e.g. from device events (default: wall clock with `sync`).
        seed: seed of the random order.
        progress: title of a progress bar, or None for none.

    Returns:
        name -> milliseconds of each round; the lists share their indices.

    Raises:
        ValueError: no alternatives, or no rounds.
    """
    if not alternatives or repeats < 1 or warmup < 0:
        raise ValueError(
            "interleave: expected at least one alternative, repeats >= 1 and warmup >= 0, "
            f"got {len(alternatives)}, {repeats} and {warmup}"
        )
    shuffle = random.Random(seed).shuffle
    order = list(alternatives)
    times: dict[str, list[float]] = {name: [] for name in alternatives}
    for turn in tqdm(range(warmup + repeats), desc=progress, disable=progress is None or None, leave=False):
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
    """Return quantiles, with linear interpolation.

    Raises:
        ValueError: `values` is empty.
    """
    if not len(values):
        raise ValueError("quantiles: expected at least one number, got none")
    return tuple(float(q) for q in np.quantile(np.asarray(values, dtype=np.float64), at))


def paired_ratio(times: Sequence[float], baseline: Sequence[float]) -> Ratio:
    """Compare the times of two alternatives from one `interleave` call, round by round.

    Raises:
        ValueError: the lists differ in length or are empty.
    """
    if len(times) != len(baseline) or not len(times):
        raise ValueError(
            f"paired_ratio: expected two lists of equal length from one run, got {len(times)} and {len(baseline)} times"
        )
    low, median, high = quantiles([a / b for a, b in zip(times, baseline, strict=True)])
    return Ratio(median=median, low=low, high=high)


class BatchLatency:
    """Times batches of a data set under criteria; each criterion is measured once.

    Args:
        model: an early-exit model; its criterion is restored after each measurement.
        dataset: items are mappings with the inputs of the model.
        batch_size: rows per batch.
        collate_fn: pads a list of items.
    """

    def __init__(
        self,
        model: Any,
        dataset: Any,
        *,
        batch_size: int,
        collate_fn: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    ) -> None:
        rows = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[: BATCHES * batch_size]
        loader = DataLoader(
            Subset(dataset, rows.tolist()), batch_size=batch_size, collate_fn=collate_fn or PadRight.of(model)
        )
        self._model = model
        self._batches = [{k: v.to(model.device) for k, v in batch.items() if k in INPUTS} for batch in loader]
        self._measured: dict[Criterion, float] = {}

    def __call__(self, criterion: Criterion) -> float:
        """Return the median time of a batch in milliseconds, in eval mode."""
        if criterion not in self._measured:
            self._measured[criterion] = self._measure(criterion)
        return self._measured[criterion]

    @torch.inference_mode()
    def _measure(self, criterion: Criterion) -> float:
        model, before = self._model, self._model.criterion
        sync = torch.cuda.synchronize if model.device.type == "cuda" else None
        model.eval()
        model.set_criterion(criterion)
        calls = {str(number): lambda batch=batch: model(**batch) for number, batch in enumerate(self._batches)}
        try:
            times = interleave(calls, repeats=2, warmup=1, sync=sync)
        finally:
            model.set_criterion(before)
        return quantiles([time for batch in times.values() for time in batch])[1]
