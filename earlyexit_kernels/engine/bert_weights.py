"""The weights of layers of BERT's form (`LayerNames`), and which layers are computed from them alone."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from earlyexit_kernels.backbones import LayerNames
from earlyexit_kernels.engine.layer_parts import ACTIVATION_CLASSES, head_width, parts_unsupported_reason
from earlyexit_kernels.ops import EncoderWeights

#: Activation of transformers -> its name and variant in oneDNN and torch.
ACTIVATIONS = {
    "GELUActivation": ("gelu", "none"),
    "NewGELUActivation": ("gelu", "tanh"),
    "GELUTanh": ("gelu", "tanh"),
    "ReLU": ("relu", ""),
}
#: Name and variant in `ACTIVATIONS` -> activation of the ops.
OP_ACTIVATIONS = {("gelu", "none"): "gelu", ("gelu", "tanh"): "gelu_tanh", ("relu", ""): "relu"}
#: Part of a layer -> its required type; the activation must be one of `ACTIVATIONS`.
PART_TYPES: dict[str, type[nn.Module] | None] = {
    **dict.fromkeys(("query", "key", "value", "attention_out", "inner", "outer"), nn.Linear),
    **dict.fromkeys(("attention_norm", "norm"), nn.LayerNorm),
    "activation": None,
}


class Pair(NamedTuple):
    """Weight and bias of a module, detached; they share its memory."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class LayerWeights:
    """The weights of one encoder layer, without copies.

    Attributes:
        query, key, value, attention_out, attention_norm, inner, outer, norm: as in `backbones.LayerNames`.
        eps: of the two norms.
        heads: number of attention heads.
        activation: name and variant, a value of `ACTIVATIONS`.
    """

    query: Pair
    key: Pair
    value: Pair
    attention_out: Pair
    attention_norm: Pair
    inner: Pair
    outer: Pair
    norm: Pair
    eps: list[float]
    heads: int
    activation: tuple[str, str]

    @staticmethod
    def of(layer: nn.Module, names: LayerNames, config: Any) -> LayerWeights:
        """Return the weights of a layer that `layer_unsupported_reason` accepts.

        Args:
            layer, names: of the model.
            config: of the backbone, for heads of layers that do not tell how wide theirs are.
        """
        part: dict[str, Any] = {name: layer.get_submodule(getattr(names, name)) for name in PART_TYPES}
        pairs = {
            name: Pair(part[name].weight.detach(), part[name].bias.detach())
            for name, kind in PART_TYPES.items()
            if kind
        }
        eps = [part["attention_norm"].eps, part["norm"].eps]
        width = head_width(layer.get_submodule(_attention(names)))
        heads = pairs["query"].weight.shape[0] // width if width else config.num_attention_heads
        return LayerWeights(**pairs, eps=eps, heads=heads, activation=ACTIVATIONS[type(part["activation"]).__name__])

    @property
    def projections(self) -> tuple[Pair, Pair, Pair]:
        """Query, key and value."""
        return self.query, self.key, self.value

    def joined(self) -> EncoderWeights:
        """Return the weights with query, key and value as one linear, which is a copy."""
        qkv = (torch.cat(each) for each in zip(*self.projections, strict=True))
        after = (self.attention_out, self.attention_norm, self.inner, self.outer, self.norm)
        return EncoderWeights(*qkv, *itertools.chain.from_iterable(after))


def layer_unsupported_reason(layer: nn.Module, names: LayerNames) -> str | None:
    """Return why a layer may compute something else than its `LayerWeights` tell, or None if it does not."""
    checks = {getattr(names, name): functools.partial(_unlike, kind) for name, kind in PART_TYPES.items()}
    return parts_unsupported_reason(layer, checks, attention=_attention(names))


def _attention(names: LayerNames) -> str:
    """Return the dotted name of the module that computes attention."""
    return names.query.rpartition(".")[0]


def _unlike(kind: type[nn.Module] | None, module: nn.Module) -> str | None:
    """Return why a module is not of a type with weight and bias, or for None not an activation, or None."""
    if kind is None:
        known = type(module) in ACTIVATION_CLASSES and type(module).__name__ in ACTIVATIONS
        return None if known else f"is not one of the activations {sorted(ACTIVATIONS)}"
    if type(module) is not kind or {type(module._parameters.get(n)) for n in Pair._fields} != {nn.Parameter}:
        return f"is not a plain {kind.__name__} with weight and bias"
    return None
