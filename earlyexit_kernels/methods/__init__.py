"""Training methods: one paper per file, listed in the table below."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from earlyexit_kernels.arguments import check_registered, enter
from earlyexit_kernels.methods.base import (
    PARTS,
    Method,
    PhaseSpec,
    TrainingStep,
    distributed_mean,
    mean_task_loss,
    task_loss,
)
from earlyexit_kernels.methods.berxit import Berxit
from earlyexit_kernels.methods.dact import Dact
from earlyexit_kernels.methods.deebert import Deebert
from earlyexit_kernels.methods.ensemble import Ensemble
from earlyexit_kernels.methods.fastbert import Fastbert
from earlyexit_kernels.methods.joint import Joint
from earlyexit_kernels.methods.palbert import Palbert
from earlyexit_kernels.methods.smartbert import Smartbert
from earlyexit_kernels.types import CLASSIFICATION

__all__ = [
    "METHODS",
    "PARTS",
    "Berxit",
    "Dact",
    "Deebert",
    "Ensemble",
    "Fastbert",
    "Joint",
    "Method",
    "Palbert",
    "PhaseSpec",
    "Smartbert",
    "TrainingStep",
    "check_task",
    "distributed_mean",
    "from_dict",
    "mean_task_loss",
    "method_of",
    "register",
    "task_loss",
]

#: All training methods by name; `register` adds to it.
METHODS: dict[str, type[Method]] = {
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


_Class = TypeVar("_Class", bound=type[Method])


def register(cls: _Class) -> _Class:
    """Make a training method from outside the package usable by name, in saved models and when they are loaded.

    A class replaces one of the same module and qualified name, so that a notebook cell can run again; models keep the
    method that they were built with.

    Args:
        cls: a frozen dataclass that extends `Method` and implements `loss`.

    Returns:
        The class, so that `register` can be used as a decorator.

    Raises:
        TypeError: not a subclass of `Method`.
        ValueError: a part of the class is missing, or another class has its name.

    Example:
        >>> import dataclasses
        >>> from typing import ClassVar
        >>> import earlyexit_kernels as ee
        >>> @ee.methods.register
        ... @dataclasses.dataclass(frozen=True, kw_only=True)
        ... class LastExit(ee.methods.Method):
        ...     name: ClassVar[str] = "last_exit"
        ...     rule: ClassVar[str] = "entropy"
        ...
        ...     def loss(self, trace, labels, step):
        ...         return ee.methods.mean_task_loss(trace.logits[:, -1], labels, step.problem_type)
        >>> ee.methods.method_of("last_exit")
        LastExit()
        >>> _ = ee.methods.METHODS.pop("last_exit")  # forget it again
    """
    check_registered(cls, Method, (_rule_problem, _loss_problem))
    enter(METHODS, cls)
    return cls


def _rule_problem(cls: type[Method]) -> str:
    rule = getattr(cls, "rule", None)
    return "" if isinstance(rule, str) else f"expected a class attribute `rule: ClassVar[str]`, got {rule!r}"


def _loss_problem(cls: type[Method]) -> str:
    return "expected a method loss(self, trace, labels, step), got none" if cls.loss is Method.loss else ""


def from_dict(data: Mapping[str, Any]) -> Method:
    """Build a method from the data of `Method.to_dict`.

    A field that the data lacks has the default, or what it was before the field existed (`Method.when_missing`), so
    that models saved by an earlier version keep their method.

    Raises:
        ValueError: an unknown name, or arguments that the method does not take.

    Example:
        >>> import earlyexit_kernels as ee
        >>> ee.methods.from_dict({"name": "joint", "equilibrium": True})
        Joint(equilibrium=True)
    """
    arguments = dict(data)
    name = arguments.pop("name", None)
    cls = _class_of(name)
    try:
        return cls(**{**cls.when_missing, **arguments})
    except TypeError as error:
        raise ValueError(f"method {name!r}: {error}") from None


def _class_of(name: Any) -> type[Method]:
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(
            f"method: expected one of {sorted(METHODS)}, got {name!r}; for a method of another package, import the "
            "module that registers it with earlyexit_kernels.methods.register"
        )
    return METHODS[name]


def method_of(method: str | Mapping[str, Any] | Method) -> Method:
    """Return a training method.

    Args:
        method: a name of the table, for the settings of the paper; data of `Method.to_dict`; or the method itself.

    Raises:
        ValueError: an unknown name, or arguments that the method does not take.

    Example:
        >>> import earlyexit_kernels as ee
        >>> ee.methods.method_of("pabee")
        Joint(equilibrium=False)
    """
    if isinstance(method, Method):
        return method
    if isinstance(method, type) and issubclass(method, Method):
        raise ValueError(f"method: expected a name or an instance, got the class; write {method.__name__}()")
    return from_dict(method) if isinstance(method, Mapping) else _class_of(method)()


def check_task(method: Method, problem_type: str, classes: int) -> None:
    """Check that a training method is defined for a task.

    Args:
        method: the method.
        problem_type: of the model, as in transformers.
        classes: number of outputs C.

    Raises:
        ValueError: the method is not defined for the problem type, or compares classes and there is only one.

    Example:
        >>> import earlyexit_kernels as ee
        >>> ee.methods.check_task(ee.methods.Joint(), "regression", 1)
    """
    if problem_type not in method.tasks:
        able = sorted(name for name, cls in METHODS.items() if problem_type in cls.tasks)
        raise ValueError(
            f"method {method.name!r} is defined for {sorted(method.tasks)}, got problem_type={problem_type!r}; "
            f"methods for that: {able or 'none, it is unknown'}"
        )
    if method.tasks == CLASSIFICATION and classes < 2:
        raise ValueError(f"method {method.name!r} compares classes and needs at least 2, got {classes}")
