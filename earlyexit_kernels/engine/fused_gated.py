"""Fused encoder layers with norms before attention and feed-forward, rotary positions and a gated feed-forward.

That is the form of ModernBERT and EuroBERT (`backbones.GatedLayerNames`). A layer runs as one matrix product for query,
key and value, rotation of query and key together, attention over the packed tokens, in full or in a window, and two
products fused with the addition of their input; the fourth computes both halves of the gated feed-forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from earlyexit_kernels.backbones import GatedLayerNames
from earlyexit_kernels.engine.attention import attend_by_plan
from earlyexit_kernels.engine.attention_plan import AttentionKind, AttentionPlan
from earlyexit_kernels.engine.fused_bert import onednn_unsupported_reason, products_here
from earlyexit_kernels.engine.gated_weights import LINEARS, GatedWeights, linears_of


@dataclass(frozen=True)
class PackedLinear:
    """A linear.

    Attributes:
        weight, bias: of the module, without copies.
        packed: the weight in oneDNN's layout (a copy), or None without oneDNN.
        packed_up_to: largest number of tokens for which it is used.
    """

    weight: Tensor
    bias: Tensor | None
    packed: Tensor | None
    packed_up_to: float

    @staticmethod
    def of(weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """Pack the weight of a linear."""
        # without oneDNN its names may be missing from torch.ops
        onednn = onednn_unsupported_reason(weight.dtype) is None
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, None) if onednn else None
        return PackedLinear(weight, bias, packed, products_here().packed_up_to)

    def __call__(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Return ``x W + b``, and `other` added to it if given, for ``[T, ...]``."""
        if self.packed is None or x.shape[0] > self.packed_up_to:
            y = F.linear(x, self.weight, self.bias)
            return y if other is None else y.add_(other)
        if other is None:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.packed, self.bias, "add")


@dataclass(frozen=True)
class FusedGatedLayer:
    """One fused layer over packed tokens, called as the original one: ``layer(hidden, plan=..., ...)``.

    Attributes:
        weights: of the layer.
        qkv, attention_out, inner, outer: its linears, packed; those of a part side by side.
    """

    weights: GatedWeights
    qkv: PackedLinear
    attention_out: PackedLinear
    inner: PackedLinear
    outer: PackedLinear

    def __call__(self, hidden: Tensor, *, plan: AttentionPlan, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """``[1, T, H] -> [1, T, H]``, with cosine and sine ``[1, T, D]`` of the angles of the positions."""
        x, own = hidden[0], self.weights
        read = x if own.attention_norm is None else own.attention_norm(x)
        x = self.attention_out(self._attended(self.qkv(read), plan, *position_embeddings), x)
        inner = self.inner(x if own.norm is None else own.norm(x))
        half = inner.shape[1] // 2
        return self.outer(own.activation(inner[:, :half]) * inner[:, half:], x)[None]

    def _attended(self, qkv: Tensor, plan: AttentionPlan, cos: Tensor, sin: Tensor) -> Tensor:
        """Return attention ``[T, heads * D]`` over query, key and value side by side."""
        tokens, heads = qkv.view(qkv.shape[0], -1, self.weights.head_width), self.weights.heads
        shared = (tokens.shape[1] - heads) // 2
        turning, v = tokens.split((heads + shared, shared), dim=1)
        q, k = rotated(turning, cos[0], sin[0]).split((heads, shared), dim=1)
        return attend_by_plan(q, k, v, plan, None, 0.0, AttentionKind(window=self.weights.window)).flatten(1)


def rotated(tokens: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return heads ``[T, heads, D]`` rotated by the angles of their tokens, in float32.

    Args:
        tokens: queries and keys.
        cos, sin: ``[T, D]``; value i and value i + D / 2 of a head are turned by one angle.
    """
    x, half = tokens.float(), tokens.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * cos[:, None] + turned * sin[:, None]).to(tokens.dtype)


def pack_layer(layer: nn.Module, names: GatedLayerNames, config: Any) -> FusedGatedLayer:
    """Pack a layer that `gated_weights.layer_unsupported_reason` accepts."""
    weights = GatedWeights.of(layer, names)
    return FusedGatedLayer(weights, *(PackedLinear.of(*getattr(weights, name)) for name in LINEARS))


def copied_parameters(layer: nn.Module, names: GatedLayerNames) -> Iterator[Tensor]:
    """Yield the parameters that `pack_layer` copies."""
    for name in LINEARS:
        linears = linears_of(layer, names, name)
        yield from (linear.weight for linear in linears)
        if len(linears) > 1:
            yield from (linear.bias for linear in linears if linear.bias is not None)
