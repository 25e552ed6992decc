"""The weights of layers of ModernBERT's form (`GatedLayerNames`), and which layers are computed from them alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from earlyexit_kernels.backbones import GatedLayerNames
from earlyexit_kernels.engine.layer_parts import ACTIVATION_CLASSES, parts_unsupported_reason

LINEARS = ("qkv", "attention_out", "inner", "outer")
NORMS = ("attention_norm", "norm")
#: Classes of transformers that divide by the root of the mean square, in float32, and multiply by a weight.
RMS_NORMS = ("EuroBertRMSNorm",)


class Affine(NamedTuple):
    """Weight and bias of a linear, detached; they share its memory, or are copies of several linears side by side."""

    weight: Tensor
    bias: Tensor | None

    @staticmethod
    def of(linears: Sequence[nn.Linear]) -> Affine:
        """Return those of one linear, or of several with the same inputs."""
        weights = [linear.weight.detach() for linear in linears]
        biases = [None if linear.bias is None else linear.bias.detach() for linear in linears]
        if len(linears) == 1:
            return Affine(weights[0], biases[0])
        filled = [w.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)]
        return Affine(torch.cat(weights), None if biases == [None] * len(biases) else torch.cat(filled))


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


class RootMeanSquare(NamedTuple):
    """Weight of a norm by the root of the mean square, detached; it shares its memory."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``[T, H]`` normalised."""
        return self.weight * F.rms_norm(x.float(), x.shape[1:], eps=self.eps).to(x.dtype)


@dataclass(frozen=True)
class GatedWeights:
    """The weights and settings of one layer, without copies except of parts that consist of several linears.

    Attributes:
        attention_norm, qkv, attention_out, norm, inner, activation, outer: as in `backbones.GatedLayerNames`; None for
            a norm that is an `nn.Identity`.
        head_width: D.
        window: a token attends to those fewer than this many columns away; None: to all of its row.
    """

    attention_norm: Norm | RootMeanSquare | None
    norm: Norm | RootMeanSquare | None
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
        norms: dict[str, Any] = {name: _norm_of(layer.get_submodule(getattr(names, name))) for name in NORMS}
        linears: dict[str, Any] = {name: Affine.of(linears_of(layer, names, name)) for name in LINEARS}
        attention: Any = layer.get_submodule(attention_path(names))
        return GatedWeights(
            **norms,
            **linears,
            activation=layer.get_submodule(names.activation),
            head_width=attention.head_dim,
            window=getattr(attention, "sliding_window", None),
        )

    @property
    def heads(self) -> int:
        """Number of heads of the query; key and value may have fewer."""
        return self.attention_out.weight.shape[1] // self.head_width


def linears_of(layer: nn.Module, names: GatedLayerNames, part: str) -> Sequence[Any]:
    """Return the linears that a part of a layer consists of."""
    return [layer.get_submodule(path) for path in names.of(part)]


def attention_path(names: GatedLayerNames) -> str:
    """Return the dotted name of the attention module in a layer."""
    return names.of("qkv")[0].rpartition(".")[0]


def _norm_of(module: Any) -> Norm | RootMeanSquare | None:
    if type(module).__name__ in RMS_NORMS:
        return RootMeanSquare(module.weight.detach(), module.variance_epsilon)
    return Norm.of(module)


def layer_unsupported_reason(layer: nn.Module, names: GatedLayerNames) -> str | None:
    """Return why a layer may compute something else than its `GatedWeights` tell, or None if it does not."""
    checks = {
        **{path: _unlike_linear for name in LINEARS for path in names.of(name)},
        **{getattr(names, name): _unlike_norms for name in NORMS},
        names.activation: _unlike_activation,
    }
    path = attention_path(names)
    reason = parts_unsupported_reason(layer, checks, attention=path, refused=("attn_logit_softcapping",))
    return reason or _attention_unsupported_reason(path, layer, names) or _sizes_unsupported_reason(layer, names)


def _unlike_linear(module: nn.Module) -> str | None:
    plain = type(module) is nn.Linear and type(module._parameters.get("weight")) is nn.Parameter
    return None if plain and _bias_fits(module) else "is not a plain Linear"


def unlike_norm(module: nn.Module) -> str | None:
    """Return why a module is neither a layer norm nor an `nn.Identity`, or None."""
    plain = type(module) is nn.LayerNorm and _bias_fits(module)
    return None if plain or type(module) is nn.Identity else "is not a plain LayerNorm"


def _unlike_norms(module: nn.Module) -> str | None:
    known = type(module).__name__ in RMS_NORMS and type(module).__module__.startswith("transformers.")
    fits = known and type(module._parameters.get("weight")) is nn.Parameter and len(module._parameters) == 1
    return None if fits else unlike_norm(module)


def _bias_fits(module: nn.Module) -> bool:
    return "bias" in module._parameters and type(module._parameters["bias"]) in (nn.Parameter, type(None))


def _unlike_activation(module: nn.Module) -> str | None:
    known = type(module) in ACTIVATION_CLASSES and not module._parameters and not module._modules
    return None if known else "is not one of the activations of transformers without weights"


def _attention_unsupported_reason(path: str, layer: nn.Module, names: GatedLayerNames) -> str | None:
    """Return why the heads or the window of a layer's attention are not supported, or None."""
    attention: Any = layer.get_submodule(path)
    outputs = [linear.weight.shape[0] for linear in linears_of(layer, names, "qkv")]
    title, width = f"{path} ({type(attention).__name__})", cast(Any, getattr(attention, "head_dim", None))
    if len(outputs) == 1 and not (_is_positive(width) and outputs[0] % (3 * width) == 0):
        return f"{title} has head_dim {width!r}, expected a divisor of a third of {outputs[0]}"
    if len(outputs) == 3:
        q, k, v = outputs
        if not (_is_positive(width) and k % width == 0 and k == v and q % k == 0):
            return f"{title} has head_dim {width!r}, and query, key and value of {outputs}, expected whole heads"
    window = getattr(attention, "sliding_window", None)
    if window is not None and not _is_positive(window):
        return f"{title} has sliding_window {window!r}, expected None or at least 1"
    return None


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and value >= 1


def _sizes_unsupported_reason(layer: nn.Module, names: GatedLayerNames) -> str | None:
    """Return why the sizes of the linears do not fit, or None; oneDNN adds tensors of other shapes without an error."""
    qkv, inner = (linears_of(layer, names, name) for name in ("qkv", "inner"))
    (outputs, width), rows = qkv[0].weight.shape, inner[0].weight.shape[0]
    queries, half = outputs // (3 if len(qkv) == 1 else 1), rows // (2 if len(inner) == 1 else 1)
    expected: dict[str, tuple[int, int]] = {
        **{path: (own.weight.shape[0], width) for path, own in zip(names.of("qkv"), qkv, strict=True)},
        names.attention_out: (width, queries),
        **dict.fromkeys(names.of("inner"), (2 * half // len(inner), width)),
        names.outer: (width, half),
    }
    for path, shape in expected.items():
        found = tuple(cast(nn.Linear, layer.get_submodule(path)).weight.shape)
        if found != shape:
            return f"{path} has a weight of shape {list(found)}, expected {list(shape)}"
    return None
