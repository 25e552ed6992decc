"""Comparison of the layers at which recent rows left with those of the calibration."""

from __future__ import annotations

import logging
import threading
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from earlyexit_kernels.arguments import number, whole
from earlyexit_kernels.hf.model import EarlyExitForSequenceClassification
from earlyexit_kernels.tuning.record import Calibration

logger = logging.getLogger("earlyexit_kernels")

#: Least expected number of rows of a cell of the test, in the smaller of the two samples.
LEAST_EXPECTED = 5


class ExitDrift:
    """The exit layers of the most recent rows, compared with those of the check rows of a calibration.

    Text that differs from what a model was calibrated on often leaves at other layers, long before any label tells.
    Each time that `window` new rows have been seen, a two-sample test compares these rows with the check rows. A
    p-value below `alpha` is logged as a warning, once until a later window is no longer below it. Every row is tested
    once, so that about a share `alpha` of the windows is below it by chance. `observe` may be called from several
    threads.

    Args:
        calibration: of the model, as `Calibration.of` returns it.
        window: number of recent rows to compare.
        alpha: p-value below which rows count as different.

    Attributes:
        calibration: the calibration given.
        drifting: whether the last window that was tested differed.
        tests: number of windows tested.

    Example:

        >>> import torch
        >>> import earlyexit_kernels as ee
        >>> labels = torch.arange(400) % 2
        >>> right = torch.nn.functional.one_hot(labels, 2).float()
        >>> easy = (torch.arange(400) % 3 > 0)[:, None]
        >>> trace = ee.ExitTrace(torch.stack([right * easy * 4, right * 6], dim=1))  # 2 of 3 rows are sure at exit 1
        >>> drift = ee.ExitDrift(ee.calibrate(trace, labels, target=ee.MaxDrop(0.0)), window=100)
        >>> drift.observe([1, 1, 2, 1] * 25)
        >>> drift.drifting, round(drift.distance, 1)
        (False, 0.1)
        >>> drift.observe([2] * 100)
        >>> drift.drifting, round(drift.distance, 1)
        (True, 0.7)
    """

    def __init__(self, calibration: Calibration, *, window: int = 1000, alpha: float = 0.001) -> None:
        if not isinstance(calibration, Calibration):
            raise TypeError(
                f"ExitDrift: expected a calibration, got {type(calibration).__name__}; Calibration.of(model) is None "
                "until calibrate has chosen the criterion of the model"
            )
        self.calibration = calibration
        self.window = whole(low=1)("ExitDrift(window=...)", window)
        self.alpha = number(low=0, high=1, inside=True)("ExitDrift(alpha=...)", alpha)
        self.drifting = False
        self.tests = 0
        self._reference = np.rint(np.array(calibration.exit_shares) * calibration.rows["check"]).astype(np.int64)
        self._recent = np.zeros(0, dtype=np.int64)
        self._untested = 0
        self._lock = threading.Lock()

    @property
    def expected(self) -> tuple[float, ...]:
        """Share of the check rows that left at each layer 1..L."""
        return self.calibration.exit_shares

    @property
    def rows(self) -> int:
        """Number of rows compared, at most `window`."""
        return len(self._recent)

    @property
    def observed(self) -> tuple[float, ...]:
        """Share of the recent rows that left at each layer 1..L; zeros before the first row."""
        counts = self._counts(self._recent)
        return tuple((counts / max(counts.sum(), 1)).tolist())

    @property
    def distance(self) -> float:
        """Total variation between `observed` and `expected`: the share of rows that left elsewhere; 0 without rows."""
        return float(np.abs(np.subtract(self.observed, self.expected)).sum() / 2) if self.rows else 0.0

    @property
    def p_value(self) -> float:
        """The p-value of the recent rows, of `mix_p_value`; 1 without rows."""
        return mix_p_value(self._reference, self._counts(self._recent))

    def observe(self, exit_layer: ArrayLike | torch.Tensor) -> None:
        """Add the exit layers of further rows, in the order of their arrival.

        Args:
            exit_layer: ``[N]`` 1-based layers.

        Raises:
            ValueError: not layers of the model.
        """
        layers = exit_layer.cpu().numpy() if isinstance(exit_layer, torch.Tensor) else np.asarray(exit_layer)
        depth = self.calibration.depth
        if not layers.size:
            return
        if layers.ndim != 1 or layers.dtype.kind not in "iu" or layers.min() < 1 or layers.max() > depth:
            raise ValueError(f"observe: expected layers [N] from 1 to {depth}, got {exit_layer!r}")
        with self._lock:
            start = 0
            while start < len(layers):
                part = layers[start : start + self.window - self._untested]
                start += len(part)
                self._recent = np.concatenate([self._recent, part])[-self.window :]
                self._untested += len(part)
                if self._untested == self.window:
                    self._untested = 0
                    self._test()

    def _test(self) -> None:
        """Compare the window, all of whose rows are new."""
        p_value, before = self.p_value, self.drifting
        self.tests += 1
        self.drifting = p_value < self.alpha
        if self.drifting and not before:
            logger.warning(
                "the last %d rows leave at other layers than the %d rows of the calibration (p = %.2g, distance %.2f): "
                "shares of the layers %s, calibrated %s. The text may have changed: check the answers, and calibrate "
                "again on new rows",
                self.window,
                self.calibration.rows["check"],
                p_value,
                self.distance,
                _percentages(self.observed),
                _percentages(self.expected),
            )

    def _counts(self, layers: NDArray) -> NDArray:
        return np.bincount(layers, minlength=self.calibration.depth + 1)[1:]

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles start without rows."""
        return _rebuilt, (self.calibration, self.window, self.alpha)


def drift_of(model: EarlyExitForSequenceClassification, window: int) -> ExitDrift | None:
    """Return a comparison with the calibration of a model, or None if it has none.

    Raises:
        ValueError: the calibration is of another number of layers.
    """
    calibration = Calibration.of(model)
    if calibration is None:
        return None
    if calibration.depth != model.depth:
        raise ValueError(
            f"expected a calibration of {model.depth} layers, as the model has, got one of {calibration.depth}; "
            "calibrate the model on rows of its own"
        )
    return ExitDrift(calibration, window=window)


def _rebuilt(calibration: Calibration, window: int, alpha: float) -> ExitDrift:
    return ExitDrift(calibration, window=window, alpha=alpha)


def _percentages(shares: tuple[float, ...]) -> str:
    return " ".join(f"{share:.0%}" for share in shares)


def mix_p_value(first: NDArray, second: NDArray) -> float:
    """Return the p-value that two samples of rows leave at each layer with the same probability.

    Pearson's chi-squared test of homogeneity, of layers joined with their neighbours until `LEAST_EXPECTED` rows are
    expected of each in the smaller sample. Below that the chi-squared distribution does not hold, and layers that
    hardly a row leaves at are common. The joining depends on the sums of both samples only, and leaves the test valid.
    Kolmogorov-Smirnov tests, made for numbers without ties, are conservative here.

    Args:
        first, second: number of rows at each layer 1..L.

    Returns:
        the p-value; 1 where there are too few rows to tell.
    """
    table = _joined(np.stack([first, second]).astype(np.float64))
    if table.shape[1] < 2:
        return 1.0
    expected = table.sum(axis=1, keepdims=True) * table.sum(axis=0) / table.sum()
    statistic = ((table - expected) ** 2 / expected).sum()
    # the upper tail of the chi-squared distribution, as scipy.stats.chi2.sf, which would be a further dependency
    half = torch.tensor([(table.shape[1] - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def _joined(table: NDArray) -> NDArray:
    """Join columns of counts ``[2, L]`` with their neighbours until enough rows are expected of each."""
    rows = table.sum(axis=1)
    if not rows.all():
        return table[:, :0]
    least = LEAST_EXPECTED * rows.sum() / rows.min()
    columns, waiting = [], np.zeros(2)
    for column in table.T:
        waiting = waiting + column
        if waiting.sum() >= least:
            columns.append(waiting)
            waiting = np.zeros(2)
    if columns:
        columns[-1] = columns[-1] + waiting
    return np.stack(columns, axis=1) if columns else table[:, :0]
