"""Exit criteria: the rules that decide when a row leaves. One file per rule, listed in the tables below."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from earlyexit_kernels.arguments import defined_again, enter, path_of
from earlyexit_kernels.backends import BACKENDS, resolve
from earlyexit_kernels.criteria.base import CLASS_KEY, Criterion
from earlyexit_kernels.criteria.dact import Dact
from earlyexit_kernels.criteria.divergence_patience import DivergencePatience
from earlyexit_kernels.criteria.energy import Energy
from earlyexit_kernels.criteria.entropy import Entropy
from earlyexit_kernels.criteria.expectation import Expectation
from earlyexit_kernels.criteria.fixed_layer import FixedLayer
from earlyexit_kernels.criteria.full_depth import FullDepth
from earlyexit_kernels.criteria.hidden_cosine import HiddenCosine
from earlyexit_kernels.criteria.learned import Learned
from earlyexit_kernels.criteria.margin import Margin
from earlyexit_kernels.criteria.max_probability import MaxProbability
from earlyexit_kernels.criteria.patience import Patience
from earlyexit_kernels.criteria.patient_confidence import PatientConfidence
from earlyexit_kernels.criteria.q_exit import QExit
from earlyexit_kernels.criteria.registration import check_class, check_instance, check_outputs, has_triton_step
from earlyexit_kernels.criteria.sampled_exit import SampledExit
from earlyexit_kernels.criteria.skip_gate import SkipGate
from earlyexit_kernels.criteria.voting import Voting
from earlyexit_kernels.errors import BackendUnavailableError

__all__ = [
    "CRITERIA",
    "RULES",
    "Criterion",
    "Dact",
    "DivergencePatience",
    "Energy",
    "Entropy",
    "Expectation",
    "FixedLayer",
    "FullDepth",
    "HiddenCosine",
    "Learned",
    "Margin",
    "MaxProbability",
    "Patience",
    "PatientConfidence",
    "QExit",
    "SampledExit",
    "SkipGate",
    "Voting",
    "check_fits",
    "check_known",
    "from_dict",
    "register",
    "supported_backends",
]

logger = logging.getLogger("earlyexit_kernels")

#: The rules of the package, implemented by every back-end, in the order of csrc/criteria.h.
RULES: dict[str, type[Criterion]] = {
    "full_depth": FullDepth,
    "entropy": Entropy,
    "max_probability": MaxProbability,
    "margin": Margin,
    "patience": Patience,
    "q_exit": QExit,
    "sampled_exit": SampledExit,
    "expectation": Expectation,
    "voting": Voting,
    "dact": Dact,
    "learned": Learned,
    "patient_confidence": PatientConfidence,
    "divergence_patience": DivergencePatience,
    "hidden_cosine": HiddenCosine,
    "energy": Energy,
    "fixed_layer": FixedLayer,
}
#: All criteria that a model can use and a config can hold, by name; `register` adds to it.
CRITERIA: dict[str, type[Criterion]] = {**RULES, "skip_gate": SkipGate}

_Class = TypeVar("_Class", bound=type[Criterion])


def register(cls: _Class) -> _Class:
    """Make a criterion from outside the package usable by models, replay, sweeps, saving and loading.

    The torch rule is enough: such a criterion runs on back-end ``"torch"``, which ``"auto"`` then resolves to. With a
    Triton step it runs on ``"triton"`` too. Register the class in the module that defines it, so that importing the
    module before loading is all that a saved model requires.

    A class replaces one of the same module and qualified name, so that a notebook cell can run again; criteria that
    were built from the first one are refused from then on.

    Args:
        cls: a frozen dataclass that extends `Criterion`; see there for the parts it implements.

    Returns:
        The class, so that `register` can be used as a decorator.

    Raises:
        TypeError: not a subclass of `Criterion`.
        ValueError: a part of the class is missing or wrong, or another class has its name.

    Example:
        >>> import dataclasses
        >>> from typing import ClassVar
        >>> import torch
        >>> import earlyexit_kernels as ee
        >>> @ee.criteria.register
        ... @dataclasses.dataclass(frozen=True, kw_only=True)
        ... class FirstLogit(ee.criteria.Criterion):
        ...     threshold: float
        ...     name: ClassVar[str] = "first_logit"
        ...
        ...     def params(self, layer):
        ...         return [self.threshold]
        ...
        ...     @staticmethod
        ...     def rule(z, aux, state, layer, depth, params):
        ...         return z, z[:, 0] > params[0], state
        >>> trace = ee.ExitTrace(torch.tensor([[[0.0, 1.0], [3.0, 1.0], [0.0, 1.0]]]))
        >>> ee.replay(trace, FirstLogit(threshold=2.0))[1].tolist()
        [2]
        >>> _ = ee.criteria.CRITERIA.pop("first_logit")  # forget it again
    """
    check_class(cls)
    enter(CRITERIA, cls)
    return cls


def rule_named(name: str) -> type[Criterion]:
    """Return the class of a rule.

    Raises:
        ValueError: no criterion has this name.
    """
    if name not in CRITERIA:
        raise ValueError(f"criterion: expected one of {sorted(CRITERIA)}, got {name!r}")
    return CRITERIA[name]


def supported_backends(name: str) -> tuple[str, ...]:
    """Return the back-ends that implement a rule: all of them for a rule of this package.

    Args:
        name: of the rule.

    Example:
        >>> import earlyexit_kernels as ee
        >>> ee.criteria.supported_backends("entropy")
        ('torch', 'triton', 'cpp')
    """
    if name in RULES:
        return BACKENDS
    return ("torch", "triton") if has_triton_step(rule_named(name)) else ("torch",)


@torch.compiler.assume_constant_result
def resolve_backend(name: str, backend: str, device: str | torch.device) -> str:
    """Choose the back-end that runs a rule on tensors on a device.

    Args:
        name: of the rule.
        backend: ``"auto"`` or the name of a back-end.
        device: of the tensors, or its kind: ``"cpu"``, or ``"cuda"`` for the current GPU.

    Raises:
        ValueError: an unknown back-end or rule.
        BackendUnavailableError: the back-end does not implement the rule, or cannot run here.
    """
    supported = supported_backends(name)
    if backend in BACKENDS and backend not in supported:
        raise BackendUnavailableError(
            f"backend {backend!r} does not implement criterion {name!r}, which supports {', '.join(supported)}; choose "
            "one of these or 'auto'"
        )
    chosen = resolve(backend, device, supported)
    if backend == "auto" and supported != BACKENDS:
        _log_restriction(name, chosen)
    return chosen


@functools.cache
def _log_restriction(name: str, backend: str) -> None:
    """Log once that a rule narrowed the choice of back-ends."""
    logger.warning(
        "criterion %r supports the back-ends %s: 'auto' chose %r", name, ", ".join(supported_backends(name)), backend
    )


def torch_step(
    rule: Criterion | type[Criterion],
    z: Tensor,
    aux: Tensor | None,
    state: Tensor,
    layer: int,
    depth: int,
    params: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Decide at one exit by the torch rule of a criterion; see `Criterion.rule`.

    Raises:
        ValueError: the rule is from outside the package, and what it returned has another form than documented.
    """
    outputs = rule.rule(z, aux, state, layer, depth, params)
    if rule.name not in RULES:
        check_outputs(rule.name, outputs, z, state)
    return outputs


def from_dict(data: Mapping[str, Any] | None) -> Criterion:
    """Build a criterion, and the criteria within it, from the data of `Criterion.to_dict`.

    Args:
        data: from `Criterion.to_dict`; None is full depth.

    Raises:
        ValueError: an unknown name, or arguments that the criterion does not take.

    Example:
        >>> import earlyexit_kernels as ee
        >>> ee.criteria.from_dict({"name": "patience", "patience": 2})
        Patience(patience=2, tolerance=None)
    """
    if data is None:
        return FullDepth()
    if not isinstance(data, Mapping):
        raise ValueError(f"criterion: expected the data of Criterion.to_dict or None, got {data!r}")
    arguments = {key: from_dict(value) if isinstance(value, Mapping) else value for key, value in data.items()}
    name, class_path = arguments.pop("name", None), arguments.pop(CLASS_KEY, None)
    if not isinstance(name, str) or name not in CRITERIA:
        raise ValueError(f"criterion: expected one of {sorted(CRITERIA)}, got {name!r}{_how_to_register(class_path)}")
    try:
        return CRITERIA[name](**arguments)
    except TypeError as error:
        raise ValueError(f"criterion {name!r}: {error}") from None


def _how_to_register(class_path: Any) -> str:
    if class_path is None:
        return ""
    return (
        f"; it was saved with the class {class_path}, which is not registered here: import the module that registers "
        "it with earlyexit_kernels.criteria.register (--import MODULE of the command), then load again"
    )


def check_known(criterion: Criterion) -> None:
    """Check that the back-ends implement the decision of a criterion.

    Args:
        criterion: of any class. A subclass of one of `CRITERIA` is known as long as it keeps the decision.

    Raises:
        ValueError: the class is not in `CRITERIA`, decides differently from the class of its name there, or was
            registered again after the criterion was built.

    Example:
        >>> import earlyexit_kernels as ee
        >>> ee.criteria.check_known(ee.criteria.Entropy(threshold=0.3))
    """
    known = CRITERIA.get(getattr(criterion, "name", ""))
    decision = ("rule", "triton_step", "needs")
    if known is None or any(
        getattr(type(criterion), part, None) is not getattr(known, part, None) for part in decision
    ):
        if known is not None and defined_again(type(criterion), known):
            raise ValueError(
                f"criterion {criterion.name!r}: {path_of(known)} was registered again after this criterion was built; "
                "build the criterion again, and give it to the models that hold this one with set_criterion"
            )
        raise ValueError(
            f"criterion {type(criterion).__name__}: expected a class of earlyexit_kernels.criteria "
            f"({', '.join(sorted(cls.__name__ for cls in CRITERIA.values()))}), got an unregistered class with its own "
            "decision; register it with earlyexit_kernels.criteria.register, under a name of its own"
        )


def check_fits(criterion: Criterion, *, depth: int, classes: int, problem_type: str, aux: Sequence[str]) -> None:
    """Check that a criterion is known, is defined for the task and can run on exits of this shape.

    Args:
        criterion: as for `check_known`.
        depth: number of exits L.
        classes: number of outputs C.
        problem_type: of the model, as in transformers.
        aux: names of the scalars that the heads produce.

    Raises:
        ValueError: it is not, or cannot; the message names the criteria that fit the task.

    Example:
        >>> import earlyexit_kernels as ee
        >>> shape = {"depth": 12, "classes": 2, "problem_type": "single_label_classification", "aux": ()}
        >>> ee.criteria.check_fits(ee.criteria.Entropy(threshold=0.3), **shape)
    """
    check_known(criterion)
    check_known(criterion.exit_rule)
    if criterion.exit_rule.name not in RULES:
        check_instance(criterion.exit_rule, depth)
    if problem_type not in criterion.exit_rule.tasks:
        fed = [cls for cls in CRITERIA.values() if _has_inputs(cls, aux)]
        fitting = sorted(cls.__name__ for cls in fed if problem_type in cls.tasks)
        raise ValueError(
            f"criterion {criterion.exit_rule.name!r} is defined for {sorted(criterion.exit_rule.tasks)}, got "
            f"problem_type={problem_type!r}; for {problem_type} these heads have {', '.join(fitting)}"
        )
    criterion.check(depth=depth, classes=classes, problem_type=problem_type, aux=aux)


def _has_inputs(cls: type[Criterion], aux: Sequence[str]) -> bool:
    """Return whether heads produce the scalar that a criterion reads."""
    needs = "gate" if cls is SkipGate else cls.needs
    return needs is None or needs in aux
