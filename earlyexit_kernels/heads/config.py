"""Configuration of a model's exit heads, saved with the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

from transformers.activations import ACT2FN

from earlyexit_kernels.arguments import Check, check_fields, choice, flag, number, whole
from earlyexit_kernels.types import FAMILY_POOLINGS, POOLINGS

#: Check of each field except `activation`, which is a name of the table of transformers.
CHECKS: dict[str, Check] = {
    "pooling": choice(None, *POOLINGS),
    "family_pooling": choice(*FAMILY_POOLINGS),
    "form": choice("linear", "attention"),
    "exit_dense": choice("shared", "own"),
    "halting_input": choice("single", "concat", "diff"),
    **dict.fromkeys(("width", "attention_heads", "halting_layers"), whole(low=1)),
    **dict.fromkeys(
        (
            "dropout_before_dense",
            "dense_bias",
            "norm",
            "norm_bias",
            "shared_exit",
            "halting",
            "halting_shared",
            "uncertainty",
            "gates",
            "contrast",
        ),
        flag,
    ),
    "dropout": number(low=0.0, high=1.0),
    "norm_eps": number(low=0.0, high=1.0),
    "halting_bias": number(),
    "gate_bias": number(),
}
#: Attention heads of a gate.
GATE_HEADS = 2
#: Field -> whether it has an effect on heads of this configuration; fields that are missing here always have.
CONDITIONS: dict[str, Callable[[HeadConfig], bool]] = {
    **dict.fromkeys(("exit_dense", "dense_bias", "norm"), lambda config: config.has_dense),
    **dict.fromkeys(("norm_eps", "norm_bias"), lambda config: config.has_dense and config.norm),
    "family_pooling": lambda config: config.pooling is None,
    "width": lambda config: config.form == "attention" or config.gates,
    "attention_heads": lambda config: config.form == "attention",
    # an initial value is not part of the shape
    "halting_bias": lambda config: False,
    "gate_bias": lambda config: False,
}


@dataclass(frozen=True)
class HeadConfig:
    """Configuration of the exit heads, saved with the model.

    Attributes:
        pooling: None for the form of the family's own head (pooled token, dense, activation, dropout, linear),
            ``"first"``, ``"mean"`` or ``"last"`` for a linear on the pooled hidden state. An attention exit pools the
            output of its attention.
        family_pooling: with ``pooling=None``, what the family's head reads: one of these, or ``"late"``: dense and
            activation are applied to each token, and their mean is read.
        activation: after the dense module, a name in the table of transformers; unused without a dense module.
        dropout: probability before the linear, in training.
        dropout_before_dense: whether dropout is also applied before the dense module, as in RoBERTa and ELECTRA.
        dense_bias: whether the dense module has a bias.
        norm: whether a layer norm follows its activation, as in ModernBERT.
        norm_eps, norm_bias: of this norm.
        form: ``"linear"``, or ``"attention"``: each token projected to `width`, self-attention within the row, pooling,
            dense, linear.
        width: of attention exits, gates and contrast projections.
        attention_heads: of attention exits.
        exit_dense: with ``pooling=None``, one dense module for all exits (``"shared"``) or one for each (``"own"``).
        shared_exit: one exit for all layers.
        halting: add a halting output.
        halting_input: the halting output reads the exit's features (``"single"``), these and those of the previous exit
            (``"concat"``), or their difference (``"diff"``).
        halting_layers: 1 for one linear, n >= 2 for n hidden tanh layers before it.
        halting_shared: one halting output for all layers.
        halting_bias: initial bias of the halting output.
        uncertainty: add an uncertainty output, one for all layers.
        gates: add a gate before each layer, which may skip it.
        gate_bias: initial bias of the gates' outputs.
        contrast: add the token projections for contrastive training.

    Raises:
        ValueError: a value that is not allowed.
    """

    pooling: str | None = None
    activation: str = "tanh"
    dropout: float = 0.0
    dropout_before_dense: bool = False
    family_pooling: str = "first"
    dense_bias: bool = True
    norm: bool = False
    norm_eps: float = 1e-5
    norm_bias: bool = True
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
    gate_bias: float = 0.0
    contrast: bool = False

    def __post_init__(self) -> None:
        check_fields(self, CHECKS)
        if not isinstance(self.activation, str) or self.activation not in ACT2FN:
            raise ValueError(f"HeadConfig(activation=...): expected one of {sorted(ACT2FN)}, got {self.activation!r}")
        attentions = (self.attention_heads,) * (self.form == "attention") + (GATE_HEADS,) * self.gates
        for heads in attentions:
            if self.width % heads:
                raise ValueError(
                    f"HeadConfig(width=...): expected a multiple of the {heads} attention heads, got {self.width}"
                )
        if self.contrast and self.form != "attention":
            raise ValueError(
                "HeadConfig(contrast=True): expected form='attention', whose token features it projects, got 'linear'"
            )

    @property
    def has_dense(self) -> bool:
        """Whether the exits have a dense module of full width before the linear."""
        return self.form == "linear" and self.pooling is None

    @property
    def reads(self) -> str:
        """What of a row the exits read: ``"first"``, ``"mean"`` or ``"last"`` token."""
        pooling = self.pooling or self.family_pooling
        return "mean" if pooling == "late" else pooling

    @property
    def remembers(self) -> bool:
        """Whether the halting output reads the features of the previous exit."""
        return self.halting and self.halting_input != "single"

    def matters(self, field: str) -> bool:
        """Return whether a field has an effect on heads of this configuration."""
        return CONDITIONS.get(field, lambda config: True)(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as JSON-ready data, which `from_dict` reads back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> HeadConfig:
        """Build the configuration from the data of `to_dict`.

        Raises:
            ValueError: an unknown setting, or a value that is not allowed.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(data) - set(known))
        if unknown:
            raise ValueError(
                f"heads: expected settings among {known}, got {unknown}; a later release of earlyexit_kernels may have "
                "written them, install that one"
            )
        return cls(**data)


class BankSizes(NamedTuple):
    """Number of modules of each kind: none, one that all layers share, or one for each layer."""

    dense: int
    norm: int
    attention: int
    out: int
    halting: int
    uncertainty: int
    gates: int
    projectors: int
    contrast: int


def bank_sizes(config: HeadConfig, depth: int) -> BankSizes:
    """Return how many modules of each kind the exits of `depth` layers have."""
    exits = 1 if config.shared_exit else depth
    dense = config.has_dense * (exits if config.exit_dense == "own" else 1)
    return BankSizes(
        dense=dense,
        norm=config.norm * dense,
        attention=exits if config.form == "attention" else 0,
        out=exits,
        halting=config.halting * (1 if config.halting_shared else depth),
        uncertainty=int(config.uncertainty),
        gates=config.gates * depth,
        projectors=config.contrast * depth,
        contrast=config.contrast * (depth - 1),
    )
