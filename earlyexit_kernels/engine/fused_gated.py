"""Fused encoder layers with norms before attention and feed-forward, rotary positions and a gated feed-forward.

That is the form of ModernBERT (`backbones.GatedLayerNames`). A layer runs as one matrix product for query, key and
value, rotation of query and key together, attention over the packed tokens, in full or in a window, and two products
fused with the addition of their input; the fourth computes both halves of the gated feed-forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from earlyexit_kernels.backbones import GatedLayerNames
from earlyexit_kernels.engine.attention import attend_by_plan
from earlyexit_kernels.engine.attention_plan import AttentionKind, AttentionPlan
from earlyexit_kernels.engine.fused_bert import PRODUCTS, onednn_unsupported_reason
from earlyexit_kernels.engine.layer_parts import ACTIVATION_CLASSES, parts_unsupported_reason

LINEARS = ("qkv", "attention_out", "inner", "outer")
NORMS = ("attention_norm", "norm")


@dataclass(frozen=True)
class PackedLinear:
    """A linear.

    Attributes:
        weight, bias: detached; they share the memory of the module's.
        packed: the weight in oneDNN's layout (a copy), or None without oneDNN.
        packed_up_to: largest number of tokens for which it is used.
    """

    weight: Tensor
    bias: Tensor | None
    packed: Tensor | None
    packed_up_to: float

    @staticmethod
    def of(linear: nn.Linear) -> PackedLinear:
        """Pack the weight of a linear."""
        weight, bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
        # without oneDNN its names may be missing from torch.ops
        onednn = onednn_unsupported_reason(weight.dtype) is None
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, None) if onednn else None
        products = PRODUCTS.get(torch.backends.cpu.get_cpu_capability(), PRODUCTS["DEFAULT"])
        return PackedLinear(weight, bias, packed, products.packed_up_to)

    def __call__(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Return ``x W + b``, and `other` added to it if given, for ``[T, ...]``."""
        if self.packed is None or x.shape[0] > self.packed_up_to:
            y = F.linear(x, self.weight, self.bias)
            return y if other is None else y.add_(other)
        if other is None:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.packed, self.bias, "add")


class Norm(NamedTuple):
    """Weight and bias of a layer norm, detached; they share its memory."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``[T, H]`` normalised."""
        return F.layer_norm(x, x.shape[1:], self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class FusedGatedLayer:
    """One fused layer over packed tokens, called as the original one: ``layer(hidden, plan=..., ...)``.

    Attributes:
        attention_norm, norm: before attention and before the feed-forward, or None for none.
        qkv, attention_out, inner, outer: the linears; `inner` computes the input of the activation, then the gate.
        activation: the layer's own, which has no weights.
        head_width: D.
        kind: of the attention.
    """

    attention_norm: Norm | None
    norm: Norm | None
    qkv: PackedLinear
    attention_out: PackedLinear
    inner: PackedLinear
    outer: PackedLinear
    activation: Callable[[Tensor], Tensor]
    head_width: int
    kind: AttentionKind

    def __call__(self, hidden: Tensor, *, plan: AttentionPlan, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """``[1, T, H] -> [1, T, H]``, with cosine and sine ``[1, T, D]`` of the angles of the positions."""
        x = hidden[0]
        read = x if self.attention_norm is None else self.attention_norm(x)
        x = self.attention_out(self._attended(self.qkv(read), plan, *position_embeddings), x)
        inner = self.inner(x if self.norm is None else self.norm(x))
        half = inner.shape[1] // 2
        return self.outer(self.activation(inner[:, :half]) * inner[:, half:], x)[None]

    def _attended(self, qkv: Tensor, plan: AttentionPlan, cos: Tensor, sin: Tensor) -> Tensor:
        """Return attention ``[T, heads * D]`` over ``[T, 3 * heads * D]``."""
        tokens = qkv.view(qkv.shape[0], 3, -1, self.head_width)
        q, k = rotated(tokens[:, :2], cos[0], sin[0]).unbind(1)
        return attend_by_plan(q, k, tokens[:, 2], plan, None, 0.0, self.kind).flatten(1)


def rotated(tokens: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return heads ``[T, 2, heads, D]`` rotated by the angles of their tokens, in float32 as in transformers.

    Args:
        tokens: queries and keys.
        cos, sin: ``[T, D]``; value i and value i + D / 2 of a head are turned by one angle.
    """
    x, half = tokens.float(), tokens.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * cos[:, None, None] + turned * sin[:, None, None]).to(tokens.dtype)


def layer_unsupported_reason(layer: nn.Module, names: GatedLayerNames) -> str | None:
    """Return why `FusedGatedLayer` would compute something else than a layer, or None if it computes the same."""
    checks = {
        **{getattr(names, name): _unlike_linear for name in LINEARS},
        **{getattr(names, name): _unlike_norm for name in NORMS},
        names.activation: _unlike_activation,
    }
    path = names.qkv.rpartition(".")[0]
    reason = parts_unsupported_reason(layer, checks, attention=path)
    return reason or _attention_unsupported_reason(path, layer, names) or _sizes_unsupported_reason(layer, names)


def _unlike_linear(module: nn.Module) -> str | None:
    plain = type(module) is nn.Linear and type(module._parameters.get("weight")) is nn.Parameter
    return None if plain and _bias_fits(module) else "is not a plain Linear"


def _unlike_norm(module: nn.Module) -> str | None:
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


def pack_layer(layer: nn.Module, names: GatedLayerNames, config: Any) -> FusedGatedLayer:
    """Pack a layer that `layer_unsupported_reason` accepts."""
    part: dict[str, Any] = {name: layer.get_submodule(getattr(names, name)) for name in (*LINEARS, *NORMS)}
    attention: Any = layer.get_submodule(names.qkv.rpartition(".")[0])
    norms: dict[str, Any] = {name: _norm_of(part[name]) for name in NORMS}
    linears: dict[str, Any] = {name: PackedLinear.of(part[name]) for name in LINEARS}
    return FusedGatedLayer(
        **norms,
        **linears,
        activation=layer.get_submodule(names.activation),
        head_width=attention.head_dim,
        kind=AttentionKind(window=getattr(attention, "sliding_window", None)),
    )


def _norm_of(module: Any) -> Norm | None:
    if isinstance(module, nn.Identity):
        return None
    weight, bias = (None if x is None else x.detach() for x in (module.weight, module.bias))
    return Norm(weight, bias, module.eps)


def copied_parameters(layer: nn.Module, names: GatedLayerNames) -> Iterator[Tensor]:
    """Yield the parameters that `pack_layer` copies."""
    for name in LINEARS:
        linear: Any = layer.get_submodule(getattr(names, name))
        yield linear.weight
