"""Encoder layers of ModernBERT's and EuroBERT's form (`backbones.GatedLayerNames`).

A layer runs as one matrix product for query, key and value, rotation of query and key together, attention over the
packed tokens, in full or in a window, and two products fused with the addition of their input; the fourth computes both
halves of the gated feed-forward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from earlyexit_kernels.backbones.forms_gated import LINEARS, GatedWeights
from earlyexit_kernels.core.attention import attend_by_plan
from earlyexit_kernels.core.attention_plan import AttentionKind, AttentionPlan
from earlyexit_kernels.cpu.onednn import PackedLinear, products_here


@dataclass(frozen=True)
class GatedLayer:
    """One layer over packed tokens, called as the original one: ``layer(hidden, plan=..., ...)``.

    Attributes:
        weights: of the layer.
        qkv, attention_out, inner, outer: its linears, packed; those of a part side by side.
    """

    weights: GatedWeights
    qkv: PackedLinear
    attention_out: PackedLinear
    inner: PackedLinear
    outer: PackedLinear

    @staticmethod
    def of(weights: GatedWeights) -> GatedLayer:
        """Pack the weights of a layer."""
        return GatedLayer(weights, *(PackedLinear.of(*weights.joined(name), products_here()) for name in LINEARS))

    def __call__(self, hidden: Tensor, *, plan: AttentionPlan, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """``[1, T, H] -> [1, T, H]``, with cosine and sine ``[1, T, D]`` of the angles of the positions."""
        x, own = hidden[0], self.weights
        read = x if own.attention_norm is None else own.attention_norm(x)
        x = self.attention_out.added(self._attended(self.qkv(read), plan, *position_embeddings), x)
        inner = self.inner(x if own.norm is None else own.norm(x))
        half = inner.shape[1] // 2
        return self.outer.added(own.activation(inner[:, :half]) * inner[:, half:], x)[None]

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
