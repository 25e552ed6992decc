"""The weights of layers of ModernBERT's form (`GatedLayerNames`), and which layers are computed from them alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from earlyexit_kernels.backbones import GatedLayerNames
from earlyexit_kernels.engine.layer_parts import ACTIVATION_CLASSES, parts_unsupported_reason

LINEARS = ("qkv", "attention_out", "inner", "outer")
NORMS = ("attention_norm", "norm")


class Affine(NamedTuple):
    """Weight and bias of a linear, detached; they share its memory."""

    weight: Tensor
    bias: Tensor | None

    @staticmethod
    def of(linear: nn.Linear) -> Affine:
        """Return those of a linear."""
        return Affine(linear.weight.detach(), None if linear.bias is None else linear.bias.detach())


class Norm(NamedTuple):
    """Weight and bias of a layer norm, detached; they share its memory."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float

    @staticmethod
    def of(module: Any) -> Norm | None:
        """Return those of a norm that `unlike_norm` accepts, or None of an `nn.Identity`."""
        if type(module) is nn.Identity:
            return None
        weight, bias = (None if x is None else x.detach() for x in (module.weight, module.bias))
        return Norm(weight, bias, module.eps)

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``[T, H]`` normalised."""
        return F.layer_norm(x, x.shape[1:], self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class GatedWeights:
    """The weights and settings of one layer, without copies.

    Attributes:
        attention_norm, qkv, attention_out, norm, inner, activation, outer: as in `backbones.GatedLayerNames`; None for
            a norm that is an `nn.Identity`.
        head_width: D.
        window: a token attends to those fewer than this many columns away; None: to all of its row.
    """

    attention_norm: Norm | None
    norm: Norm | None
    qkv: Affine
    attention_out: Affine
    inner: Affine
    outer: Affine
    activation: nn.Module
    head_width: int
    window: int | None

    @staticmethod
    def of(layer: nn.Module, names: GatedLayerNames) -> GatedWeights:
        """Return those of a layer that `layer_unsupported_reason` accepts."""
        part: dict[str, Any] = {name: layer.get_submodule(getattr(names, name)) for name in (*LINEARS, *NORMS)}
        norms: dict[str, Any] = {name: Norm.of(part[name]) for name in NORMS}
        linears: dict[str, Any] = {name: Affine.of(part[name]) for name in LINEARS}
        attention: Any = layer.get_submodule(names.qkv.rpartition(".")[0])
        return GatedWeights(
            **norms,
            **linears,
            activation=layer.get_submodule(names.activation),
            head_width=attention.head_dim,
            window=getattr(attention, "sliding_window", None),
        )


def layer_unsupported_reason(layer: nn.Module, names: GatedLayerNames) -> str | None:
    """Return why a layer may compute something else than its `GatedWeights` tell, or None if it does not."""
    checks = {
        **{getattr(names, name): _unlike_linear for name in LINEARS},
        **{getattr(names, name): unlike_norm for name in NORMS},
        names.activation: _unlike_activation,
    }
    path = names.qkv.rpartition(".")[0]
    reason = parts_unsupported_reason(layer, checks, attention=path, refused=("attn_logit_softcapping",))
    return reason or _attention_unsupported_reason(path, layer, names) or _sizes_unsupported_reason(layer, names)


def _unlike_linear(module: nn.Module) -> str | None:
    plain = type(module) is nn.Linear and type(module._parameters.get("weight")) is nn.Parameter
    return None if plain and _bias_fits(module) else "is not a plain Linear"


def unlike_norm(module: nn.Module) -> str | None:
    """Return why a module is neither a layer norm nor an `nn.Identity`, or None."""
    plain = type(module) is nn.LayerNorm and _bias_fits(module)
    return None if plain or type(module) is nn.Identity else "is not a plain LayerNorm"


def _bias_fits(module: nn.Module) -> bool:
    return "bias" in module._parameters and type(module._parameters["bias"]) in (nn.Parameter, type(None))


def _unlike_activation(module: nn.Module) -> str | None:
    known = type(module) in ACTIVATION_CLASSES and not module._parameters and not module._modules
    return None if known else "is not one of the activations of transformers without weights"


def _attention_unsupported_reason(path: str, layer: nn.Module, names: GatedLayerNames) -> str | None:
    """Return why the heads or the window of a layer's attention are not supported, or None."""
    attention: Any = layer.get_submodule(path)
    qkv: Any = layer.get_submodule(names.qkv)
    title, outputs = f"{path} ({type(attention).__name__})", qkv.weight.shape[0]
    width, window = getattr(attention, "head_dim", None), getattr(attention, "sliding_window", None)
    if not isinstance(width, int) or width < 1 or outputs % (3 * width):
        return f"{title} has head_dim {width!r}, expected a divisor of a third of {outputs}"
    if window is not None and not (isinstance(window, int) and window >= 1):
        return f"{title} has sliding_window {window!r}, expected None or at least 1"
    return None


def _sizes_unsupported_reason(layer: nn.Module, names: GatedLayerNames) -> str | None:
    """Return why the sizes of the linears do not fit, or None; oneDNN adds tensors of other shapes without an error."""
    linear: dict[str, Any] = {name: layer.get_submodule(getattr(names, name)) for name in LINEARS}
    (outputs, width), halves = linear["qkv"].weight.shape, linear["inner"].weight.shape[0]
    expected = {
        "attention_out": (width, outputs // 3),
        "inner": (halves // 2 * 2, width),
        "outer": (width, halves // 2),
    }
    for name, shape in expected.items():
        if tuple(linear[name].weight.shape) != shape:
            found = list(linear[name].weight.shape)
            return f"{getattr(names, name)} has a weight of shape {found}, expected {list(shape)}"
    return None
