"""Base class of the exit criteria, and the computations that several of them share."""

from __future__ import annotations

import dataclasses
import itertools
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from earlyexit_kernels.arguments import Check, check_fields, number, one_or_each, whole
from earlyexit_kernels.types import CLASSIFICATION

Threshold: TypeAlias = float | Sequence[float]
#: Largest count: float32 represents all whole numbers up to this one.
MAX_COUNT = 2**24
#: Maximum number of parameters of a rule at a layer; equals `kMaxParams` in csrc/call.h.
MAX_PARAMS = 3
#: Smallest normal float32 number, which replaces a probability of 0 before its logarithm is taken.
TINY = torch.finfo(torch.float32).tiny
#: Scalar output of the heads -> the argument of `to_early_exit` that adds it.
ADDED_BY = {"halting": "method='palbert' or 'dact'", "uncertainty": "method='berxit'", "gate": "method='smartbert'"}
#: Check of the number of consecutive exits that some rules count.
PATIENCE = whole(low=1, high=MAX_COUNT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Criterion:
    """Base class of the exit criteria.

    A subclass is a frozen dataclass with keyword-only fields that implements `rule` in torch, and optionally as a
    Triton step. Every back-end calls the rule on rows with valid logits only: a row with invalid logits (NaN, several
    +inf, all -inf) stays in the batch and keeps its state. At the last layer every row leaves, whatever the rule
    returns.

    Class attributes:
        name: key of the criteria table, of the list in C++ and of the saved config.
        needs: scalar that the heads must produce for this rule (a key of `types.AUX_ACTIVATIONS`), or None.
        tasks: problem types that the rule is defined for.
        uses_keys: whether `new_state` requires a key for each row.
        checks: check of each field, by name.
        triton_step: device function ``(z, aux, cols, classes, state, rows, live, layer, depth, p0, p1, p2)`` ->
            ``(answer, leave)`` on the ``[BLOCK_C]`` logits of one row, or None. `state` points at the first number of
            the row's state; each further one is `rows` elements on. Numbers for each class follow the others. Every
            warp reads the state itself, so a step reads all of it before ``tl.debug_barrier()`` and writes after it.

    Example:
        >>> import earlyexit_kernels as ee
        >>> rule = ee.criteria.Entropy(threshold=0.3)
        >>> isinstance(rule, ee.criteria.Criterion), rule.to_dict()
        (True, {'name': 'entropy', 'threshold': 0.3, 'normalized': False})
    """

    name: ClassVar[str]
    needs: ClassVar[str | None] = None
    tasks: ClassVar[frozenset[str]] = CLASSIFICATION
    uses_keys: ClassVar[bool] = False
    checks: ClassVar[Mapping[str, Check]] = {}
    triton_step: ClassVar[Any] = None

    def __new__(cls, *given: Any, **settings: Any) -> Any:
        by_name = [field.name for field in dataclasses.fields(cls) if field.kw_only]
        if given and len(by_name) == len(dataclasses.fields(cls)) > 0:
            raise TypeError(
                f"{cls.__name__}: expected settings by name, such as {cls.__name__}({by_name[0]}={given[0]!r}), got "
                f"{reprlib.repr(given[0])} without a name"
            )
        known = [field.name for field in dataclasses.fields(cls) if field.init]
        if unknown := [name for name in settings if name not in known]:
            expected = f"the settings {', '.join(known)}" if known else "no settings"
            raise TypeError(f"{cls.__name__}: expected {expected}, got {unknown[0]!r}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_fields(self, self.checks)

    def params(self, layer: int) -> list[float]:
        """Return the parameters of the rule at 1-based `layer`, at most `MAX_PARAMS` numbers."""
        return []

    @property
    def exit_rule(self) -> Criterion:
        """The rule that decides at an exit: this one, or the one that this criterion wraps."""
        return self

    @property
    def skip_from(self) -> float | None:
        """The gate value from which a row skips a layer, or None for a criterion that skips no layers."""
        return None

    def initial_state(self, classes: int) -> tuple[float, ...]:
        """Return the K numbers that the state of a row starts with; K may depend on the number of classes."""
        return ()

    @staticmethod
    def rule(
        z: Tensor, aux: Tensor | None, state: Tensor, layer: int, depth: int, params: Sequence[float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Decide at one exit, in torch.

        Args:
            z: valid logits ``[B, C]`` float32.
            aux: ``[B]`` float32, the scalar named by `needs`, or None.
            state: ``[K, B]`` float32.
            layer: 1-based layer.
            depth: number of layers.
            params: what `params(layer)` returned.

        Returns:
            The answer ``[B, C]`` float32, whether the row leaves ``[B]`` bool, and the new state ``[K, B]`` float32.
        """
        raise NotImplementedError

    def is_due(self, layer: int, depth: int) -> bool:
        """Return whether the exit of 1-based `layer` has to be computed."""
        return True

    def new_state(self, rows: int, device: torch.device, classes: int, keys: Tensor | None = None) -> Tensor:
        """Return the state before layer 1, ``[K, N]`` float32.

        Args:
            rows: N.
            device: of the state.
            classes: C.
            keys: ``[N]`` int64, a hash of each row's tokens, for rules with `uses_keys`.
        """
        runs = [(value, len(list(run))) for value, run in itertools.groupby(self.initial_state(classes))]
        # filled on the device: a copy from the host would synchronise, and cannot be captured in a CUDA graph
        parts = [torch.full((size, rows), value, dtype=torch.float32, device=device) for value, size in runs]
        return torch.cat(parts) if parts else torch.empty(0, rows, dtype=torch.float32, device=device)

    def check(self, *, depth: int, classes: int, problem_type: str, aux: Sequence[str]) -> None:
        """Check that the rule can run on exits of this shape; `check_fits` checks the problem type first.

        Args:
            depth: number of exits.
            classes: number of outputs C.
            problem_type: of the model, as in transformers.
            aux: names of the scalars that the heads produce.

        Raises:
            ValueError: the heads lack the scalar it needs, there is one class to compare, or a list of thresholds does
                not have one number for each exit before the last.
        """
        if self.needs is not None and self.needs not in aux:
            raise ValueError(missing_output_message(self.name, self.needs, aux))
        if self.tasks == CLASSIFICATION and classes < 2:
            raise ValueError(f"criterion {self.name!r} compares classes and needs at least 2, got {classes}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple) and len(value) != depth - 1:
                raise ValueError(
                    f"{field.name} of criterion {self.name!r}: expected one number for each of the {depth - 1} exits "
                    f"before the last, got {len(value)}"
                )

    def to_dict(self) -> dict[str, Any]:
        """Return the criterion as JSON-ready data, which `criteria.from_dict` reads back.

        The data of a class from outside this package also names the class, for the error of a program that loads the
        data without having registered it. Nothing is imported by that name.
        """
        data = {"name": self.name, **{f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}}
        cls = type(self)
        outside = not cls.__module__.startswith("earlyexit_kernels.")
        return {**data, CLASS_KEY: f"{cls.__module__}.{cls.__qualname__}"} if outside else data


#: Entry of the saved data that names a class from outside this package.
CLASS_KEY = "class"


def _plain(value: Any) -> Any:
    if isinstance(value, Criterion):
        return value.to_dict()
    return list(value) if isinstance(value, tuple) else value


def refused_criterion_message(where: str, value: Any, *, none_allowed: bool = False) -> str:
    """Return the error message for a value that is not a criterion."""
    got = f"the class {value.__name__}" if isinstance(value, type) else reprlib.repr(value)
    full_depth = ", or None for full depth" if none_allowed else ""
    return (
        f"{where}: expected an instance of a criterion, such as earlyexit_kernels.criteria.Entropy(threshold=0.3)"
        f"{full_depth}, got {got}"
    )


def missing_output_message(criterion: str, output: str, aux: Sequence[str]) -> str:
    """Return the error message for heads that do not produce the scalar `output`."""
    cure = f"build them with to_early_exit(..., {ADDED_BY[output]})" if output in ADDED_BY else "use model.trace"
    return (
        f"criterion {criterion!r} needs heads with the output {output!r}, these produce {list(aux) or 'none'}; {cure}"
    )


def threshold_at(threshold: Any, layer: int) -> float:
    """Return the threshold of 1-based `layer`, where a list has one number for each exit before the last.

    At the last exit, where every row leaves, a list gives its last number, and an empty list 0.
    """
    if not isinstance(threshold, tuple):
        return threshold
    return threshold[min(layer, len(threshold)) - 1] if threshold else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbabilityThreshold(Criterion):
    """Base class of the rules that compare a number in [0, 1] with a threshold, or with one for each exit."""

    threshold: Threshold
    checks: ClassVar[Mapping[str, Check]] = {"threshold": one_or_each(number(low=0.0, high=1.0))}

    def params(self, layer: int) -> list[float]:
        return [threshold_at(self.threshold, layer)]


def shifted(z: Tensor) -> Tensor:
    """Return ``z - max z`` over the classes, ``[B, C]``; the maximum itself gives 0 even where it is +inf."""
    # inf - inf is NaN, and belongs to the maximum
    return (z - z.amax(dim=-1, keepdim=True)).nan_to_num(nan=0.0)


def softmax(z: Tensor) -> Tensor:
    """Return the class probabilities ``[B, C]`` of valid logits, of which one may be +inf."""
    return shifted(z).softmax(dim=-1)


def entropy_nats(z: Tensor) -> Tensor:
    """Return the entropy of the class probabilities ``[B]`` in nats, with 0 log 0 = 0."""
    d = shifted(z)
    e = d.exp()
    total = e.sum(dim=-1)
    return total.log() - torch.where(e > 0, e * d, 0.0).sum(dim=-1) / total


def lowest_argmax(z: Tensor) -> Tensor:
    """Return the index of the largest logit of each row as float32 ``[B]``; ties go to the lowest class."""
    classes = torch.arange(z.shape[-1], device=z.device, dtype=torch.float32)
    top = z.amax(dim=-1, keepdim=True)
    return torch.where(z == top, classes, float(z.shape[-1])).min(dim=-1).values
