"""The shape of a model's exit heads, saved with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

from transformers.activations import ACT2FN

POOLINGS = (None, "first", "mean")
#: Field -> its allowed values.
CHOICES: dict[str, tuple[Any, ...]] = {
    "pooling": POOLINGS,
    "form": ("linear", "attention"),
    "exit_dense": ("shared", "own"),
    "halting_input": ("single", "concat", "diff"),
}
AT_LEAST_ONE = ("width", "attention_heads", "halting_layers")
FLAGS = ("dropout_before_dense", "shared_exit", "halting", "halting_shared", "uncertainty", "gates", "contrast")
NUMBERS = ("dropout", "halting_bias")
#: Attention heads of a gate.
GATE_HEADS = 2
#: Field -> the condition on the shape under which it says anything.
CONDITIONS: dict[str, Callable[[HeadConfig], bool]] = {
    "exit_dense": lambda shape: shape.has_dense,
    "width": lambda shape: shape.form == "attention" or shape.gates,
    "attention_heads": lambda shape: shape.form == "attention",
    # where a halting output starts doesn't change what it is
    "halting_bias": lambda shape: False,
}


@dataclass(frozen=True)
class HeadConfig:
    """Shape of the exit heads, saved with the model.

    Attributes:
        pooling: None for the family's own form (first token, dense, activation, dropout, linear), ``"first"`` or
            ``"mean"`` for a linear on the pooled hidden state. An attention exit pools what it has attended to.
        activation: after the dense module, a name of transformers' table; unused without one.
        dropout: probability before the linear, in training.
        dropout_before_dense: the RoBERTa family and ELECTRA drop out there too.
        form: ``"linear"``, or ``"attention"``: every token narrowed to `width`, self-attention inside the row, pooled,
            dense, linear.
        width, attention_heads: of attention exits; gates and contrast projections have the same width.
        exit_dense: with ``pooling=None``, one dense module for all exits (``"shared"``) or each its ``"own"``.
        shared_exit: one exit for all layers.
        halting: add a halting output.
        halting_input: it reads the exit's features (``"single"``), these and those of the exit before (``"concat"``),
            or their difference (``"diff"``).
        halting_layers: 1 for one linear, n >= 2 for n hidden tanh layers before it.
        halting_shared: one halting output for all layers.
        halting_bias: its bias at the start.
        uncertainty: add an uncertainty output, one for all layers.
        gates: add a gate before each layer, which may skip it.
        contrast: add the token projections that contrastive training compares.

    Raises:
        ValueError: a value that isn't allowed.
    """

    pooling: str | None = None
    activation: str = "tanh"
    dropout: float = 0.0
    dropout_before_dense: bool = False
    form: str = "linear"
    width: int = 128
    attention_heads: int = 4
    exit_dense: str = "shared"
    shared_exit: bool = False
    halting: bool = False
    halting_input: str = "single"
    halting_layers: int = 1
    halting_shared: bool = False
    halting_bias: float = 0.0
    uncertainty: bool = False
    gates: bool = False
    contrast: bool = False

    def __post_init__(self) -> None:
        for field, allowed in CHOICES.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}: expected one of {allowed}, got {getattr(self, field)!r}")
        for field in AT_LEAST_ONE:
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{field}: expected a whole number of at least 1, got {value!r}")
        for field in FLAGS:
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"{field}: expected True or False, got {getattr(self, field)!r}")
        for field in NUMBERS:
            value = getattr(self, field)
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise ValueError(f"{field}: expected a number, got {value!r}")
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"dropout: expected a probability, got {self.dropout!r}")
        if not math.isfinite(self.halting_bias):
            raise ValueError(f"halting_bias: expected a finite number, got {self.halting_bias!r}")
        if not isinstance(self.activation, str) or self.activation not in ACT2FN:
            raise ValueError(f"activation: expected one of {sorted(ACT2FN)}, got {self.activation!r}")
        attentions = (self.attention_heads,) * (self.form == "attention") + (GATE_HEADS,) * self.gates
        for heads in attentions:
            if self.width % heads:
                raise ValueError(f"width: expected a multiple of the {heads} attention heads, got {self.width}")
        if self.contrast and self.form != "attention":
            raise ValueError("contrast=True: expected form='attention', whose token features it projects, got 'linear'")

    @property
    def has_dense(self) -> bool:
        """Whether a dense module at full width stands before the linear."""
        return self.form == "linear" and self.pooling is None

    @property
    def remembers(self) -> bool:
        """Whether the halting output reads the features of the exit before."""
        return self.halting and self.halting_input != "single"

    def matters(self, field: str) -> bool:
        """Whether a field says anything about heads of this shape."""
        return CONDITIONS.get(field, lambda shape: True)(self)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> HeadConfig:
        """Build the shape from the data of `to_dict`.

        Raises:
            ValueError: an unknown setting, or a value that isn't allowed.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(data) - set(known))
        if unknown:
            raise ValueError(
                f"heads: expected settings among {known}, got {unknown}; a later release of earlyexit_kernels may have "
                "written them, install that one"
            )
        return cls(**data)
