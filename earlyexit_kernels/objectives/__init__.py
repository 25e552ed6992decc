"""Training objectives: one paper per file, listed here and nowhere else."""

from __future__ import annotations

from earlyexit_kernels.objectives.base import Objective, mean_task_loss, task_loss
from earlyexit_kernels.objectives.joint import joint_loss

__all__ = ["OBJECTIVES", "Objective", "mean_task_loss", "objective_of", "task_loss"]

OBJECTIVES: dict[str, Objective] = {
    "joint": joint_loss,
    "pabee": joint_loss,
}


def objective_of(method: str) -> Objective:
    """The objective of a training method.

    Raises:
        ValueError: an unknown name.
    """
    if method not in OBJECTIVES:
        raise ValueError(f"method: expected one of {sorted(OBJECTIVES)}, got {method!r}")
    return OBJECTIVES[method]
