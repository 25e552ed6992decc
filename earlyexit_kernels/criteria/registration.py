"""Checks of a criterion that comes from outside the package: its class, its settings, what its rule returns."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from earlyexit_kernels.arguments import check_registered
from earlyexit_kernels.criteria.base import MAX_PARAMS, Criterion
from earlyexit_kernels.types import ANY_TASK, AUX_ACTIVATIONS

RULE_ARGUMENTS = ("z", "aux", "state", "layer", "depth", "params")
STEP_ARGUMENTS = ("z", "aux", "cols", "classes", "state", "rows", "live", "layer", "depth", "p0", "p1", "p2")


def check_class(cls: Any) -> None:
    """Check that a class implements what the back-ends call.

    Args:
        cls: the class given to `criteria.register`.

    Raises:
        TypeError: not a subclass of `Criterion`.
        ValueError: names the missing or wrong part of the class.
    """
    check_registered(cls, Criterion, (_rule_problem, _inputs_problem, _step_problem))


def check_instance(criterion: Criterion, depth: int) -> None:
    """Check what a criterion from outside the package gives to the back-ends.

    Args:
        criterion: of a registered class.
        depth: number of exits L.

    Raises:
        ValueError: it has too many parameters, or a field that cannot be hashed.
    """
    counts = [len(criterion.params(layer)) for layer in range(1, depth + 1)]
    if max(counts) > MAX_PARAMS:
        raise ValueError(
            f"criterion {criterion.name!r}: expected params(layer) with at most {MAX_PARAMS} numbers, got {max(counts)}"
        )
    try:
        hash(criterion)
    except TypeError as error:
        raise ValueError(f"criterion {criterion.name!r}: expected hashable fields, got {error}; use tuples") from None


def check_outputs(name: str, outputs: Any, z: Tensor, state: Tensor) -> None:
    """Check what the torch rule of a criterion from outside the package returned.

    Args:
        name: of the criterion.
        outputs: of `Criterion.rule`.
        z: its logits ``[B, C]``.
        state: its state ``[K, B]``.

    Raises:
        ValueError: not three tensors of the documented shapes, dtypes and devices.
    """
    if not isinstance(outputs, tuple) or len(outputs) != 3:
        got = f"a tuple of {len(outputs)}" if isinstance(outputs, tuple) else type(outputs).__name__
        raise ValueError(f"criterion {name!r}: expected rule to return (answer, leave, new state), got {got}")
    answer, leave, new_state = outputs
    for what, tensor, shape, dtype in (
        ("answer", answer, z.shape, torch.float32),
        ("leave", leave, z.shape[:1], torch.bool),
        ("new state", new_state, state.shape, torch.float32),
    ):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"criterion {name!r}: expected {what} to be a tensor, got {type(tensor).__name__}")
        if (tensor.shape, tensor.dtype, tensor.device) != (shape, dtype, z.device):
            raise ValueError(
                f"criterion {name!r}: expected {what} {list(shape)} {dtype} on {z.device}, got {list(tensor.shape)} "
                f"{tensor.dtype} on {tensor.device}; correct what the rule returns"
            )


def has_triton_step(cls: type[Criterion]) -> bool:
    """Return whether a class has a Triton step for its own torch rule, not one inherited beside a new torch rule."""
    if cls.triton_step is None:
        return False
    step_owner, rule_owner = (
        next(base for base in cls.__mro__ if part in vars(base)) for part in ("triton_step", "rule")
    )
    return issubclass(step_owner, rule_owner)


def _rule_problem(cls: type[Criterion]) -> str:
    if cls.rule is Criterion.rule or not isinstance(inspect.getattr_static(cls, "rule"), staticmethod):
        return f"expected a static method rule({', '.join(RULE_ARGUMENTS)}) -> (answer, leave, new state), got none"
    found = len(inspect.signature(cls.rule).parameters)
    if found != len(RULE_ARGUMENTS):
        return f"expected rule({', '.join(RULE_ARGUMENTS)}), got a rule with {found} arguments"
    return ""


def _inputs_problem(cls: type[Criterion]) -> str:
    if cls.needs is not None and cls.needs not in AUX_ACTIVATIONS:
        return f"expected `needs` to be None or one of {sorted(AUX_ACTIVATIONS)}, got {cls.needs!r}"
    if not isinstance(cls.tasks, frozenset) or not cls.tasks or not cls.tasks <= ANY_TASK:
        return f"expected `tasks` to be a non-empty frozenset of {sorted(ANY_TASK)}, got {cls.tasks!r}"
    return ""


def _step_problem(cls: type[Criterion]) -> str:
    if cls.triton_step is None:
        return ""
    step = getattr(cls.triton_step, "fn", cls.triton_step)
    found = tuple(inspect.signature(step).parameters)
    if found != STEP_ARGUMENTS:
        return f"expected `triton_step` with the arguments {', '.join(STEP_ARGUMENTS)}, got {', '.join(found)}"
    return ""
