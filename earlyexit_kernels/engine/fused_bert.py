"""Fused encoder layers of BERT's form: post-norm, with biases (`backbones.LayerNames`).

In a float32 model they run on the vector kernels of the package (`engine.packed_layers`). In other dtypes, and where
the kernels cannot run, a layer is one matrix product for query, key and value, attention over the packed tokens, and
three products fused with their addition or activation, by oneDNN.

oneDNN caches each product by its number of tokens, so memory grows until all token counts up to
`Products.packed_up_to`, or 1024 products in all, have occurred. The environment variable
ONEDNN_PRIMITIVE_CACHE_CAPACITY sets a lower limit. Token counts are not rounded up, because the added tokens would slow
the products down.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from earlyexit_kernels.backbones import LayerNames
from earlyexit_kernels.backends import available_backends
from earlyexit_kernels.engine.attention_plan import AttentionPlan
from earlyexit_kernels.engine.bert_weights import LayerWeights
from earlyexit_kernels.engine.packed_layers import PackedLayer, kernels_unsupported_reason
from earlyexit_kernels.ops import bare_op


@dataclass(frozen=True)
class Products:
    """How the matrix products of a layer are computed.

    Attributes:
        packed_up_to: largest number of tokens for which products of packed weights are used; beyond it, torch's own
            products are faster.
        with_activation: fuse the activation into the product.
    """

    packed_up_to: float
    with_activation: bool


#: CPU capability as torch names it -> products; measured by benchmarks/micro/layer_products.py.
PRODUCTS = {
    "DEFAULT": Products(128, with_activation=False),
    "AVX2": Products(128, with_activation=False),
    "AVX512": Products(math.inf, with_activation=True),
}


def products_here() -> Products:
    """Return how products are computed on this processor."""
    return PRODUCTS.get(torch.backends.cpu.get_cpu_capability(), PRODUCTS["DEFAULT"])


@functools.cache
def onednn_unsupported_reason(dtype: torch.dtype) -> str | None:
    """Return why oneDNN's packed products are not available for a dtype, or None if they are.

    They are private names of torch, so a small product is computed to check them.
    """
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return "this CPU has no bfloat16 arithmetic"
        if dtype not in (torch.float32, torch.bfloat16):
            return f"it is not used for {dtype}"
        x, w, b = torch.ones(3, 16, dtype=dtype), torch.eye(16, dtype=dtype), torch.ones(16, dtype=dtype)
        packed = torch.ops.mkldnn._reorder_linear_weight(w, None)
        plain = torch.ops.mkldnn._linear_pointwise(x, packed, b, "relu", [], "")
        added = torch.ops.mkldnn._linear_pointwise.binary(x, x, packed, b, "add")
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        return f"torch {torch.__version__} lacks the required oneDNN operations ({error})"
    right = torch.equal(plain, x + 1) and torch.equal(added, x + 2)
    return None if right else f"the oneDNN operations of torch {torch.__version__} return other results than expected"


@dataclass(frozen=True)
class FusedLayer:
    """One fused encoder layer over packed tokens, called as the original one: ``layer(hidden, plan=...)``.

    Attributes:
        weights: of the layer.
        tensors: arguments of the op: weight and bias of query, key and value concatenated (copies), of the attention
            output, the first norm, inner, outer, and the second norm.
        packed: weights of the four products in oneDNN's layout (copies); empty without oneDNN.
        products: how the products are computed.
        run: the op.
    """

    weights: LayerWeights
    tensors: list[Tensor]
    packed: list[Tensor]
    products: Products
    run: Callable[..., Tensor]

    @staticmethod
    def of(weights: LayerWeights, backend: str) -> FusedLayer:
        """Pack the weights of one layer."""
        tensors = weights.joined()
        products = [tensors.qkv_weight, tensors.out_weight, tensors.inner_weight, tensors.outer_weight]
        # without oneDNN its names may be missing from torch.ops
        onednn = onednn_unsupported_reason(tensors.qkv_weight.dtype) is None
        return FusedLayer(
            weights=weights,
            tensors=list(tensors),
            packed=[torch.ops.mkldnn._reorder_linear_weight(w, None) for w in products] if onednn else [],
            products=products_here(),
            run=bare_op("encoder_layer", backend, "cpu"),
        )

    def __call__(self, hidden: Tensor, *, plan: AttentionPlan) -> Tensor:
        """``[1, T, H] -> [1, T, H]``."""
        x, own = hidden[0], self.weights
        packed = self.packed if x.shape[0] <= self.products.packed_up_to else []
        how = (own.eps, own.heads, *own.activation, self.products.with_activation)
        return self.run(x, self.tensors, packed, *how, *plan.grouped().arguments)[None]


def pack_layer(layer: nn.Module, names: LayerNames, config: Any, stored: torch.dtype) -> PackedLayer | FusedLayer:
    """Pack a layer that `bert_weights.layer_unsupported_reason` accepts.

    Args:
        layer, names, config: of the model.
        stored: dtype of the packed weights for the vector kernels.
    """
    weights = LayerWeights.of(layer, names, config)
    if kernels_unsupported_reason(weights.inner.weight.dtype) is None:
        return PackedLayer.of(weights, stored)
    return FusedLayer.of(weights, "torch" if available_backends("cpu")["cpp"] else "cpp")


def copied_parameters(layer: nn.Module, names: LayerNames) -> Iterator[Tensor]:
    """Yield the parameters that `pack_layer` may copy."""
    for name in ("query", "key", "value", "attention_out", "inner", "outer"):
        linear: Any = layer.get_submodule(getattr(names, name))
        yield from (linear.weight, linear.bias)
