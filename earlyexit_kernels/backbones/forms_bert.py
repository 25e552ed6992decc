"""Layers of BERT's form (`LayerNames`): post-norm, with biases."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from earlyexit_kernels.backbones.base import LayerNames
from earlyexit_kernels.backbones.forms import ACTIVATION_CLASSES, head_width, read_parts
from earlyexit_kernels.errors import Unsupported

#: Activation of transformers -> its name and variant in oneDNN and torch.
ACTIVATIONS = {
    "GELUActivation": ("gelu", "none"),
    "NewGELUActivation": ("gelu", "tanh"),
    "GELUTanh": ("gelu", "tanh"),
    "ReLU": ("relu", ""),
}
#: Name and variant in `ACTIVATIONS` -> activation of the ops.
OP_ACTIVATIONS = {("gelu", "none"): "gelu", ("gelu", "tanh"): "gelu_tanh", ("relu", ""): "relu"}
LINEARS = ("query", "key", "value", "attention_out", "inner", "outer")
NORMS = ("attention_norm", "norm")


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

    def qkv(self) -> Pair:
        """Return query, key and value as one linear, which is a copy."""
        return Pair(*(torch.cat(each) for each in zip(self.query, self.key, self.value, strict=True)))


def read_bert_layer(layer: nn.Module, names: LayerNames, config: Any) -> LayerWeights:
    """Return the weights of a layer.

    Args:
        layer, names: of the model.
        config: of the backbone, for heads of layers that do not tell how wide theirs are.

    Raises:
        Unsupported: the layer may compute something else than its weights tell.
    """
    attention = names.query.rpartition(".")[0]
    readers: dict[str, Any] = {
        **dict.fromkeys(names.linears, functools.partial(_read_pair, nn.Linear)),
        **dict.fromkeys((getattr(names, name) for name in NORMS), functools.partial(_read_pair, nn.LayerNorm)),
        names.activation: _read_activation,
    }
    parts = read_parts(layer, readers, attention)
    pairs = {name: parts[getattr(names, name)] for name in (*LINEARS, *NORMS)}
    _check_sizes(names, pairs)
    eps: list[Any] = [layer.get_submodule(getattr(names, name)).eps for name in NORMS]
    width = head_width(layer.get_submodule(attention))
    heads = pairs["query"].weight.shape[0] // width if width else config.num_attention_heads
    return LayerWeights(**pairs, eps=eps, heads=heads, activation=parts[names.activation])


def _read_pair(kind: type[nn.Module], module: nn.Module) -> Pair:
    # the parameters of other modules, such as scripted ones, may not be in a dict
    found: Any = [module._parameters.get(name) for name in Pair._fields] if type(module) is kind else ()
    if {type(parameter) for parameter in found} != {nn.Parameter}:
        raise Unsupported(f"is not a plain {kind.__name__} with weight and bias")
    return Pair(*(parameter.detach() for parameter in found))


def _check_sizes(names: LayerNames, pairs: dict[str, Pair]) -> None:
    """Check that the sizes of a layer fit, which kernels take as they are."""
    (outputs, width), inner = pairs["query"].weight.shape, pairs["inner"].weight.shape[0]
    expected: dict[str, tuple[int, ...]] = {
        **dict.fromkeys(("query", "key", "value"), (outputs, width)),
        "attention_out": (width, outputs),
        "inner": (inner, width),
        "outer": (width, inner),
        **dict.fromkeys(NORMS, (width,)),
    }
    for name, shape in expected.items():
        weight, bias = pairs[name]
        if tuple(weight.shape) != shape or tuple(bias.shape) != shape[:1]:
            got = f"{getattr(names, name)} has weight and bias of shapes {list(weight.shape)} and {list(bias.shape)}"
            raise Unsupported(f"{got}, expected {list(shape)} and {list(shape[:1])}")


def _read_activation(module: nn.Module) -> tuple[str, str]:
    if type(module) not in ACTIVATION_CLASSES or type(module).__name__ not in ACTIVATIONS:
        raise Unsupported(f"is not one of the activations {sorted(ACTIVATIONS)}")
    return ACTIVATIONS[type(module).__name__]
