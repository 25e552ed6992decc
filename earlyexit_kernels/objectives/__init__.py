"""Training methods: one paper per file, listed in the table below."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from earlyexit_kernels.arguments import check_registered, enter
from earlyexit_kernels.objectives.base import (
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
from earlyexit_kernels.types import CLASSIFICATION

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
    "register",
    "task_loss",
]

#: All training methods by name; `register` adds to it.
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


_Class = TypeVar("_Class", bound=type[Objective])


def register(cls: _Class) -> _Class:
    """Make a training method from outside the package usable by name, in saved models and when they are loaded.

    A class replaces one of the same module and qualified name, so that a notebook cell can run again; models keep the
    method that they were built with.

    Args:
        cls: a frozen dataclass that extends `Objective` and implements `loss`.

    Returns:
        The class, so that `register` can be used as a decorator.

    Raises:
        TypeError: not a subclass of `Objective`.
        ValueError: a part of the class is missing, or another class has its name.

    Example:
        >>> import dataclasses
        >>> from typing import ClassVar
        >>> import earlyexit_kernels as ee
        >>> @ee.objectives.register
        ... @dataclasses.dataclass(frozen=True, kw_only=True)
        ... class LastExit(ee.objectives.Objective):
        ...     name: ClassVar[str] = "last_exit"
        ...     rule: ClassVar[str] = "entropy"
        ...
        ...     def loss(self, trace, labels, step):
        ...         return ee.objectives.mean_task_loss(trace.logits[:, -1], labels, step.problem_type)
        >>> ee.objectives.objective_of("last_exit")
        LastExit()
        >>> _ = ee.objectives.OBJECTIVES.pop("last_exit")  # forget it again
    """
    check_registered(cls, Objective, (_rule_problem, _loss_problem))
    enter(OBJECTIVES, cls)
    return cls


def _rule_problem(cls: type[Objective]) -> str:
    rule = getattr(cls, "rule", None)
    return "" if isinstance(rule, str) else f"expected a class attribute `rule: ClassVar[str]`, got {rule!r}"


def _loss_problem(cls: type[Objective]) -> str:
    return "expected a method loss(self, trace, labels, step), got none" if cls.loss is Objective.loss else ""


def from_dict(data: Mapping[str, Any]) -> Objective:
    """Build an objective from the data of `Objective.to_dict`.

    A field that the data lacks has the default, or what it was before the field existed (`Objective.when_missing`), so
    that models saved by an earlier version keep their method.

    Raises:
        ValueError: an unknown name, or arguments that the method does not take.

    Example:
        >>> import earlyexit_kernels as ee
        >>> ee.objectives.from_dict({"name": "joint", "equilibrium": True})
        Joint(equilibrium=True)
    """
    arguments = dict(data)
    name = arguments.pop("name", None)
    cls = _class_of(name)
    try:
        return cls(**{**cls.when_missing, **arguments})
    except TypeError as error:
        raise ValueError(f"method {name!r}: {error}") from None


def _class_of(name: Any) -> type[Objective]:
    if not isinstance(name, str) or name not in OBJECTIVES:
        raise ValueError(
            f"method: expected one of {sorted(OBJECTIVES)}, got {name!r}; for a method of another package, import the "
            "module that registers it with earlyexit_kernels.objectives.register"
        )
    return OBJECTIVES[name]


def objective_of(method: str | Mapping[str, Any] | Objective) -> Objective:
    """Return the objective of a training method.

    Args:
        method: a name of the table, for the settings of the paper; data of `Objective.to_dict`; or an objective.

    Raises:
        ValueError: an unknown name, or arguments that the method does not take.

    Example:
        >>> import earlyexit_kernels as ee
        >>> ee.objectives.objective_of("pabee")
        Joint(equilibrium=False)
    """
    if isinstance(method, Objective):
        return method
    if isinstance(method, type) and issubclass(method, Objective):
        raise ValueError(f"method: expected a name or an instance, got the class; write {method.__name__}()")
    return from_dict(method) if isinstance(method, Mapping) else _class_of(method)()


def check_task(objective: Objective, problem_type: str, classes: int) -> None:
    """Check that a training method is defined for a task.

    Args:
        objective: the method.
        problem_type: of the model, as in transformers.
        classes: number of outputs C.

    Raises:
        ValueError: the method is not defined for the problem type, or compares classes and there is only one.

    Example:
        >>> import earlyexit_kernels as ee
        >>> ee.objectives.check_task(ee.objectives.Joint(), "regression", 1)
    """
    if problem_type not in objective.tasks:
        able = sorted(name for name, cls in OBJECTIVES.items() if problem_type in cls.tasks)
        raise ValueError(
            f"method {objective.name!r} is defined for {sorted(objective.tasks)}, got problem_type={problem_type!r}; "
            f"methods for that: {able or 'none, it is unknown'}"
        )
    if objective.tasks == CLASSIFICATION and classes < 2:
        raise ValueError(f"method {objective.name!r} compares classes and needs at least 2, got {classes}")
