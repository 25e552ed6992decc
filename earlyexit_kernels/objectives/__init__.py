"""Training objectives: one paper per file, listed here and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from earlyexit_kernels.objectives.base import (
    CLASSIFICATION,
    PARTS,
    Objective,
    PhaseSpec,
    TrainingStep,
    distributed_mean,
    mean_task_loss,
    task_loss,
)
from earlyexit_kernels.objectives.berxit import Berxit
from earlyexit_kernels.objectives.dact import Dact
from earlyexit_kernels.objectives.deebert import Deebert
from earlyexit_kernels.objectives.ensemble import Ensemble
from earlyexit_kernels.objectives.fastbert import Fastbert
from earlyexit_kernels.objectives.joint import Joint
from earlyexit_kernels.objectives.palbert import Palbert
from earlyexit_kernels.objectives.smartbert import Smartbert

__all__ = [
    "OBJECTIVES",
    "PARTS",
    "Berxit",
    "Dact",
    "Deebert",
    "Ensemble",
    "Fastbert",
    "Joint",
    "Objective",
    "Palbert",
    "PhaseSpec",
    "Smartbert",
    "TrainingStep",
    "check_task",
    "distributed_mean",
    "from_dict",
    "mean_task_loss",
    "objective_of",
    "task_loss",
]

OBJECTIVES: dict[str, type[Objective]] = {
    "joint": Joint,
    "pabee": Joint,
    "palbert": Palbert,
    "ensemble": Ensemble,
    "smartbert": Smartbert,
    "dact": Dact,
    "deebert": Deebert,
    "berxit": Berxit,
    "fastbert": Fastbert,
}


def from_dict(data: Mapping[str, Any]) -> Objective:
    """Build an objective from the data of `Objective.to_dict`.

    Raises:
        ValueError: an unknown name, or arguments the method doesn't take.
    """
    arguments = dict(data)
    name = arguments.pop("name", None)
    if not isinstance(name, str) or name not in OBJECTIVES:
        raise ValueError(f"method: expected one of {sorted(OBJECTIVES)}, got {name!r}")
    try:
        return OBJECTIVES[name](**arguments)
    except TypeError as error:
        raise ValueError(f"method {name!r}: {error}") from None


def objective_of(method: str | Mapping[str, Any] | Objective) -> Objective:
    """The objective of a training method.

    Args:
        method: a name of the table, for the paper's own settings; data of `Objective.to_dict`; or an objective.

    Raises:
        ValueError: an unknown name, or arguments the method doesn't take.
    """
    if isinstance(method, Objective):
        return method
    if isinstance(method, type) and issubclass(method, Objective):
        raise ValueError(f"method: expected a name or an instance, got the class; write {method.__name__}()")
    return from_dict(method if isinstance(method, Mapping) else {"name": method})


def check_task(objective: Objective, problem_type: str, classes: int) -> None:
    """Refuse a training method where it has no meaning.

    Args:
        objective: the method.
        problem_type: the model's, as in transformers.
        classes: C of the exits.

    Raises:
        ValueError: the method isn't defined for the problem type, or compares classes and there is one only.
    """
    if problem_type not in objective.tasks:
        able = sorted(name for name, cls in OBJECTIVES.items() if problem_type in cls.tasks)
        raise ValueError(
            f"method {objective.name!r} is defined for {sorted(objective.tasks)}, got problem_type={problem_type!r}; "
            f"methods for that: {able or 'none, it is unknown'}"
        )
    if objective.tasks == CLASSIFICATION and classes < 2:
        raise ValueError(f"method {objective.name!r} compares classes and needs at least 2, got {classes}")
