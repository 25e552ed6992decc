"""Bounds on the risk of early exit: the p-values and the testing order of `targets.Risk`, with MAPIE."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from earlyexit_kernels.tuning.targets import Risk


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


def check_rows(target: Risk, rows: int, total: int) -> None:
    """Refuse fewer check rows than any guarantee requires.

    Args:
        target: the risk.
        rows: number of check rows.
        total: number of all rows.

    Raises:
        ValueError: names the number needed.
    """
    if rows < target.rows_needed:
        needed = math.ceil(target.rows_needed * total / rows)
        raise ValueError(
            f"{target}: expected at least {target.rows_needed} check rows, with which a setting without any loss "
            f"passes, got {rows} of {total} rows; give at least {needed} rows that the model was not trained on, or a "
            "larger delta or epsilon"
        )
