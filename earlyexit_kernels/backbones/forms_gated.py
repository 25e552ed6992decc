"""Layers of ModernBERT's form (`GatedLayerNames`): norms first, rotary positions, a gated feed-forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from earlyexit_kernels.backbones.base import GatedLayerNames
from earlyexit_kernels.backbones.forms import ACTIVATION_CLASSES, read_parts
from earlyexit_kernels.errors import Unsupported

LINEARS = ("qkv", "attention_out", "inner", "outer")
NORMS = ("attention_norm", "norm")
#: Classes of transformers that divide by the root of the mean square, in float32, and multiply by a weight.
RMS_NORMS = ("EuroBertRMSNorm",)


class Affine(NamedTuple):
    """Weight and bias of a linear, detached; they share its memory."""

    weight: Tensor
    bias: Tensor | None


class Norm(NamedTuple):
    """Weight and bias of a layer norm, detached; they share its memory."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``[T, H]`` normalised."""
        return F.layer_norm(x, x.shape[1:], self.weight, self.bias, self.eps)


class RootMeanSquare(NamedTuple):
    """Weight of a norm by the root of the mean square, detached; it shares its memory."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``[T, H]`` normalised."""
        return self.weight * F.rms_norm(x.float(), x.shape[1:], eps=self.eps).to(x.dtype)


@dataclass(frozen=True)
class GatedWeights:
    """The weights and settings of one layer, without copies.

    Attributes:
        attention_norm, norm, activation: as in `backbones.GatedLayerNames`; None for a norm that is an `nn.Identity`.
        qkv, attention_out, inner, outer: the linears of each part.
        head_width: D.
        window: a token attends to those fewer than this many columns away; None: to all of its row.
    """

    attention_norm: Norm | RootMeanSquare | None
    norm: Norm | RootMeanSquare | None
    qkv: Sequence[Affine]
    attention_out: Sequence[Affine]
    inner: Sequence[Affine]
    outer: Sequence[Affine]
    activation: nn.Module
    head_width: int
    window: int | None

    @property
    def heads(self) -> int:
        """Number of heads of the query; key and value may have fewer."""
        return self.attention_out[0].weight.shape[1] // self.head_width

    def joined(self, part: str) -> Affine:
        """Return the linears of a part side by side: itself, or for several a copy."""
        linears = getattr(self, part)
        if len(linears) == 1:
            return linears[0]
        weight = torch.cat([linear.weight for linear in linears])
        if all(linear.bias is None for linear in linears):
            return Affine(weight, None)
        biases = [w.new_zeros(w.shape[0]) if b is None else b for w, b in linears]
        return Affine(weight, torch.cat(biases))


def read_gated_layer(layer: nn.Module, names: GatedLayerNames, config: Any) -> GatedWeights:
    """Return the weights of a layer; arguments as for `forms_bert.read_bert_layer`.

    Raises:
        Unsupported: the layer may compute something else than its weights tell.
    """
    path = names.of("qkv")[0].rpartition(".")[0]
    readers: dict[str, Any] = {
        **dict.fromkeys(names.linears, _read_linear),
        **{getattr(names, name): _read_any_norm for name in NORMS},
        names.activation: _read_activation,
    }
    parts = read_parts(layer, readers, attention=path, refused=("attn_logit_softcapping",))
    attention: Any = layer.get_submodule(path)
    linears: dict[str, Any] = {name: tuple(parts[linear] for linear in names.of(name)) for name in LINEARS}
    head_width, window = getattr(attention, "head_dim", None), getattr(attention, "sliding_window", None)
    title = f"{path} ({type(attention).__name__})"
    _check_heads(title, head_width, [linear.weight.shape[0] for linear in linears["qkv"]])
    if window is not None and not _is_positive(window):
        raise Unsupported(f"{title} has sliding_window {window!r}, expected None or at least 1")
    _check_sizes(names, linears)
    norms: dict[str, Any] = {name: parts[getattr(names, name)] for name in NORMS}
    kinds: dict[str, Any] = {"activation": parts[names.activation], "head_width": head_width, "window": window}
    return GatedWeights(**norms, **linears, **kinds)


def _read_linear(module: Any) -> Affine:
    plain = type(module) is nn.Linear and type(module._parameters.get("weight")) is nn.Parameter
    if not plain or not bias_fits(module):
        raise Unsupported("is not a plain Linear")
    return Affine(module.weight.detach(), _detached(module.bias))


def read_norm(module: Any) -> Any:
    """Return the `Norm` of a layer norm, or None of an `nn.Identity`.

    Raises:
        Unsupported: it is neither.
    """
    if type(module) is nn.Identity:
        return None
    if type(module) is not nn.LayerNorm or not bias_fits(module):
        raise Unsupported("is not a plain LayerNorm")
    return Norm(_detached(module.weight), _detached(module.bias), module.eps)


def _read_any_norm(module: Any) -> Norm | RootMeanSquare | None:
    known = type(module).__name__ in RMS_NORMS and type(module).__module__.startswith("transformers.")
    if known and type(module._parameters.get("weight")) is nn.Parameter and len(module._parameters) == 1:
        return RootMeanSquare(module.weight.detach(), module.variance_epsilon)
    return read_norm(module)


def _detached(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.detach()


def bias_fits(module: nn.Module) -> bool:
    """Return whether a linear or norm has a bias that is a parameter, or None."""
    return "bias" in module._parameters and type(module._parameters["bias"]) in (nn.Parameter, type(None))


def _read_activation(module: nn.Module) -> nn.Module:
    if type(module) not in ACTIVATION_CLASSES or module._parameters or module._modules:
        raise Unsupported("is not one of the activations of transformers without weights")
    return module


def _check_heads(title: str, width: Any, outputs: list[int]) -> None:
    """Check the heads of query, key and value, by the outputs of their linears."""
    if len(outputs) == 1 and not (_is_positive(width) and outputs[0] % (3 * width) == 0):
        raise Unsupported(f"{title} has head_dim {width!r}, expected a divisor of a third of {outputs[0]}")
    if len(outputs) == 3:
        q, k, v = outputs
        if not (_is_positive(width) and k % width == 0 and k == v and q % k == 0):
            got = f"{title} has head_dim {width!r}, and query, key and value of {outputs}"
            raise Unsupported(f"{got}, expected whole heads")


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and value >= 1


def _check_sizes(names: GatedLayerNames, linears: dict[str, Sequence[Affine]]) -> None:
    """Check that the sizes of the linears fit; oneDNN adds tensors of other shapes without an error."""
    qkv, inner = linears["qkv"], linears["inner"]
    (outputs, width), rows = qkv[0].weight.shape, inner[0].weight.shape[0]
    queries, half = outputs // (3 if len(qkv) == 1 else 1), rows // (2 if len(inner) == 1 else 1)
    expected: dict[str, Sequence[tuple[int, int]]] = {
        "qkv": [(linear.weight.shape[0], width) for linear in qkv],
        "attention_out": [(width, queries)],
        "inner": [(2 * half // len(inner), width)] * len(inner),
        "outer": [(width, half)],
    }
    for name, shapes in expected.items():
        for path, linear, shape in zip(names.of(name), linears[name], shapes, strict=True):
            if tuple(linear.weight.shape) != shape:
                got = f"{path} has a weight of shape {list(linear.weight.shape)}"
                raise Unsupported(f"{got}, expected {list(shape)}")
