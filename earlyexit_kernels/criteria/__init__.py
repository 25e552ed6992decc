"""Exit criteria: when may a row leave? One file per rule, listed here and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from earlyexit_kernels.criteria.base import Criterion
from earlyexit_kernels.criteria.entropy import Entropy
from earlyexit_kernels.criteria.full_depth import FullDepth
from earlyexit_kernels.criteria.margin import Margin
from earlyexit_kernels.criteria.max_probability import MaxProbability
from earlyexit_kernels.criteria.patience import Patience
from earlyexit_kernels.criteria.q_exit import QExit

__all__ = [
    "CRITERIA",
    "Criterion",
    "Entropy",
    "FullDepth",
    "Margin",
    "MaxProbability",
    "Patience",
    "QExit",
    "from_dict",
]

CRITERIA: dict[str, type[Criterion]] = {
    "full_depth": FullDepth,
    "entropy": Entropy,
    "max_probability": MaxProbability,
    "margin": Margin,
    "patience": Patience,
    "q_exit": QExit,
}


def from_dict(data: Mapping[str, Any] | None) -> Criterion:
    """Build a criterion from the data of `Criterion.to_dict`; None is full depth.

    Raises:
        ValueError: an unknown name, or arguments the criterion doesn't take.
    """
    if data is None:
        return FullDepth()
    arguments = dict(data)
    name = arguments.pop("name", None)
    if not isinstance(name, str) or name not in CRITERIA:
        raise ValueError(f"criterion: expected one of {sorted(CRITERIA)}, got {name!r}")
    try:
        return CRITERIA[name](**arguments)
    except TypeError as error:
        raise ValueError(f"criterion {name!r}: {error}") from None
