"""What an exit criterion is: a named rule that may end a row at a layer, plugged into every back-end's skeleton."""

from __future__ import annotations

import dataclasses
import itertools
import math
import numbers
import sys
from collections.abc import Sequence
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

Threshold: TypeAlias = float | Sequence[float]
#: Float32 holds whole numbers up to here, so a count goes no further.
MOST_COUNTED = 2**24
#: Numbers that a rule gets at a layer; `kMaxParams` in csrc/call.h.
MAX_PARAMS = 3
#: The smallest normal number of float32: what a probability of 0 becomes before its logarithm is taken.
TINY = torch.finfo(torch.float32).tiny
CLASSIFICATION = frozenset({"single_label_classification"})
FINITE = sys.float_info.max
ANY_TASK = frozenset({"single_label_classification", "multi_label_classification", "regression"})
#: Scalar of the heads -> the argument of `to_early_exit` that adds it.
BUILT_WITH = {"halting": "method='palbert' or 'dact'", "uncertainty": "method='berxit'", "gate": "method='smartbert'"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Criterion:
    """Base of the rules; a subclass is one file with the rule in torch and as a Triton step.

    The rule sees rows with meaningful logits only: the skeletons keep rows with NaN (and its like) in the batch and
    leave their state alone, and let every row go at the last layer.

    Class attributes:
        name: key of the criteria table, of the C++ list and of the saved config.
        needs: the scalar a head must produce for this rule (a key of `AUX_ACTIVATIONS`), or None.
        tasks: problem types the rule has a meaning for.
        uses_keys: `new_state` wants a key for each row.
        triton_step: device function ``(z, aux, cols, classes, state, rows, live, layer, depth, p0, p1, p2)`` ->
            ``(answer, leave)`` on one row's ``[BLOCK_C]`` logits; `state` points at the row's first value, its next
            one is `rows` further. A state with numbers for each class has them last, behind the others. Every warp
            reads the state for itself: all of it is read before ``tl.debug_barrier()``, and written behind.
    """

    name: ClassVar[str]
    needs: ClassVar[str | None] = None
    tasks: ClassVar[frozenset[str]] = CLASSIFICATION
    uses_keys: ClassVar[bool] = False
    triton_step: ClassVar[Any]

    def params(self, layer: int) -> list[float]:
        """The numbers handed to the rule at 1-based `layer`, at most three."""
        return []

    @property
    def exit_rule(self) -> Criterion:
        """The rule of `RULES` that decides at an exit: this one, or the one it is built around."""
        return self

    @property
    def skip_from(self) -> float | None:
        """The value of a layer's gate from which a row skips the layer; None where nothing is skipped."""
        return None

    def initial_state(self, classes: int) -> tuple[float, ...]:
        """The K numbers a row starts with; K may depend on C."""
        return ()

    @staticmethod
    def rule(
        z: Tensor, aux: Tensor | None, state: Tensor, layer: int, depth: int, params: Sequence[float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The rule in torch, on many rows.

        Args:
            z: logits ``[B, C]`` float32, meaningful.
            aux: ``[B]`` float32, the scalar named by `needs`, or None.
            state: ``[K, B]`` float32.
            layer, depth: 1-based layer and number of layers.
            params: the numbers of `params(layer)`.

        Returns:
            answer ``[B, C]`` float32, leave ``[B]`` bool, new state ``[K, B]``.
        """
        raise NotImplementedError

    def is_due(self, layer: int, depth: int) -> bool:
        """Whether the exit of 1-based `layer` has to be computed at all."""
        return True

    def new_state(self, rows: int, device: torch.device, classes: int, keys: Tensor | None = None) -> Tensor:
        """The state ``[K, N]`` float32 of `rows` rows before layer 1.

        Args:
            rows, classes: N and C.
            device: of the state.
            keys: ``[N]`` int64, a hash of each row's tokens, for rules with `uses_keys`.
        """
        runs = [(value, len(list(run))) for value, run in itertools.groupby(self.initial_state(classes))]
        # filled on the device: a copy from the host would synchronise, and can't be captured
        parts = [torch.full((size, rows), value, dtype=torch.float32, device=device) for value, size in runs]
        return torch.cat(parts) if parts else torch.empty(0, rows, dtype=torch.float32, device=device)

    def check(self, *, depth: int, classes: int, problem_type: str, aux: Sequence[str]) -> None:
        """Raise ValueError where the rule can't run on exits of this shape; `check_fits` looks at the task first.

        Args:
            depth, classes: L and C of the exits.
            problem_type: the model's, as in transformers.
            aux: names of the scalars the heads produce.
        """
        if self.needs is not None and self.needs not in aux:
            raise ValueError(lacks(self.name, self.needs, aux))
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
        """The criterion as JSON-ready data; `criteria.from_dict` reads it back."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"name": self.name, **{k: _plain(v) for k, v in values.items()}}


def _plain(value: Any) -> Any:
    if isinstance(value, Criterion):
        return value.to_dict()
    return list(value) if isinstance(value, tuple) else value


def lacks(criterion: str, output: str, aux: Sequence[str]) -> str:
    """What to say where the heads don't produce the scalar `output`."""
    cure = f"build them with to_early_exit(..., {BUILT_WITH[output]})" if output in BUILT_WITH else "use model.trace"
    return f"criterion {criterion!r} needs heads with a {output!r} output, these produce {list(aux) or 'none'}; {cure}"


def checked_number(criterion: str, argument: str, value: Any, *, low: float, high: float = math.inf) -> float:
    """`value` as a float if it is a finite number in ``[low, high]``, else ValueError."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not max(low, -FINITE) <= value <= min(high, FINITE):
        allowed = f"at least {low:g}" if math.isinf(high) else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{criterion}({argument}=...): expected a finite number {allowed}, got {value!r}")
    return float(value)


def checked_threshold(criterion: str, value: Any, *, low: float, high: float = math.inf) -> Any:
    """A threshold, or one for each exit before the last, validated by `checked_number`."""
    if isinstance(value, (list, tuple)):
        return tuple(checked_number(criterion, "threshold", v, low=low, high=high) for v in value)
    return checked_number(criterion, "threshold", value, low=low, high=high)


def checked_whole(criterion: str, argument: str, value: Any, *, low: int, high: int, hint: str = "") -> int:
    """`value` as an int if it is a whole number in ``[low, high]``, else ValueError."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or not low <= value <= high:
        wanted = f"expected a whole number in [{low}, {high}]"
        raise ValueError(f"{criterion}({argument}=...): {wanted}, got {value!r}{hint}")
    return int(value)


def checked_choice(criterion: str, argument: str, value: Any, choices: Sequence[str]) -> str:
    """`value` if it is one of `choices`, else ValueError."""
    if value not in choices:
        raise ValueError(f"{criterion}({argument}=...): expected one of {list(choices)}, got {value!r}")
    return value


def threshold_at(threshold: Any, layer: int) -> float:
    """The threshold of 1-based `layer`; at the last one, where every row leaves, a list's last number stands in."""
    if not isinstance(threshold, tuple):
        return threshold
    return (*threshold[:layer], 0.0)[min(layer, len(threshold)) - 1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbabilityThreshold(Criterion):
    """What the rules share that compare a number in [0, 1] with a threshold, or with one for each exit."""

    threshold: Threshold

    def __post_init__(self) -> None:
        checked = checked_threshold(type(self).__name__, self.threshold, low=0.0, high=1.0)
        object.__setattr__(self, "threshold", checked)

    def params(self, layer: int) -> list[float]:
        return [threshold_at(self.threshold, layer)]


def shifted(z: Tensor) -> Tensor:
    """``z - max z`` over the classes, with the maximum itself at 0 even where it is +inf; ``[B, C]``."""
    # inf - inf is NaN, and belongs to the maximum
    return (z - z.amax(dim=-1, keepdim=True)).nan_to_num(nan=0.0)


def softmax(z: Tensor) -> Tensor:
    """Class probabilities ``[B, C]`` of meaningful logits, one +inf allowed."""
    return shifted(z).softmax(dim=-1)


def entropy_nats(z: Tensor) -> Tensor:
    """Entropy of the class probabilities ``[B]`` in nats, with 0 log 0 = 0."""
    d = shifted(z)
    e = d.exp()
    total = e.sum(dim=-1)
    return total.log() - torch.where(e > 0, e * d, 0.0).sum(dim=-1) / total


def lowest_argmax(z: Tensor) -> Tensor:
    """Index of the largest logit of each row as float32 ``[B]``; the lowest one among ties."""
    classes = torch.arange(z.shape[-1], device=z.device, dtype=torch.float32)
    top = z.amax(dim=-1, keepdim=True)
    return torch.where(z == top, classes, float(z.shape[-1])).min(dim=-1).values
