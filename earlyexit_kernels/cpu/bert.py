"""Encoder layers of BERT's form (`backbones.LayerNames`) by oneDNN or torch, where the vector kernels do not run.

The extension runs the same steps from C++: for short rows the overhead of Python exceeds the time of the products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor

from earlyexit_kernels.backbones.forms_bert import LayerWeights, Pair
from earlyexit_kernels.backends import extension_function
from earlyexit_kernels.core.attention import attend_by_plan
from earlyexit_kernels.core.attention_plan import AttentionPlan
from earlyexit_kernels.cpu.onednn import PackedLinear, Products

#: Stands for any number of tokens.
MOST_TOKENS = 1 << 62


@dataclass(frozen=True)
class BertLayer:
    """One encoder layer over packed tokens, called as the original one: ``layer(hidden, plan=...)``.

    Attributes:
        weights: of the layer.
        qkv, attention_out, inner, outer: its linears, packed; query, key and value side by side.
    """

    weights: LayerWeights
    qkv: PackedLinear
    attention_out: PackedLinear
    inner: PackedLinear
    outer: PackedLinear

    @staticmethod
    def of(weights: LayerWeights, products: Products) -> BertLayer:
        """Pack the weights of a layer."""
        linears = (weights.qkv(), weights.attention_out, weights.inner, weights.outer)
        return BertLayer(weights, *(PackedLinear.of(w, b, products) for w, b in linears))

    def __call__(self, hidden: Tensor, *, plan: AttentionPlan) -> Tensor:
        """``[1, T, H] -> [1, T, H]``."""
        x, own = hidden[0], self.weights
        q, k, v = self.qkv(x).view(x.shape[0], 3, own.heads, -1).unbind(1)
        context = attend_by_plan(q, k, v, plan, None, 0.0).flatten(1)
        y = _normed(self.attention_out.added(context, x), own.attention_norm, own.eps[0])
        inner = self.inner.activated(y, *own.activation)
        return _normed(self.outer.added(inner, y), own.norm, own.eps[1])[None]


@dataclass(frozen=True)
class OneDnnLayer:
    """A `BertLayer` whose steps the extension runs.

    Attributes:
        layer: whose weights these are.
        run: ``(hidden, *LengthBuckets.arguments) ->`` the layer, an object of the extension that holds the weights.
    """

    layer: BertLayer
    run: Callable[..., Tensor]

    @staticmethod
    def of(weights: LayerWeights, products: Products) -> OneDnnLayer:
        """Pack the weights of a layer."""
        layer, make = BertLayer.of(weights, products), cast(Any, extension_function("OneDnnLayer"))
        linears = (layer.qkv, layer.attention_out, layer.inner, layer.outer)
        qkv, out, inner, outer = ((linear.weight, linear.bias) for linear in linears)
        packed = [linear.packed for linear in linears if linear.packed is not None]
        most = int(min(products.packed_up_to, MOST_TOKENS))
        how = (weights.eps, weights.heads, *weights.activation, products.with_activation, most)
        tensors = [*qkv, *out, *weights.attention_norm, *inner, *outer, *weights.norm]
        return OneDnnLayer(layer, make(tensors, packed, *how))

    def __call__(self, hidden: Tensor, *, plan: AttentionPlan) -> Tensor:
        """``[1, T, H] -> [1, T, H]``."""
        return self.run(hidden, *plan.grouped().arguments)


def _normed(x: Tensor, norm: Pair, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[1:], norm.weight, norm.bias, eps)
