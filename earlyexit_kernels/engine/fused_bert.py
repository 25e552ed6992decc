"""Fused encoder layers of BERT's form: post-norm, with biases (`backbones.LayerNames`).

A layer runs as one matrix product for query, key and value, attention over the packed tokens, and three products fused
with their addition or activation.

oneDNN caches each product by its number of tokens, so memory grows until all token counts up to
`Products.packed_up_to`, or 1024 products in all, have occurred. The environment variable
ONEDNN_PRIMITIVE_CACHE_CAPACITY sets a lower limit. Token counts are not rounded up, because the added tokens would slow
the products down.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from earlyexit_kernels.backbones import LayerNames
from earlyexit_kernels.backends import available_backends
from earlyexit_kernels.engine.attention_plan import AttentionPlan
from earlyexit_kernels.engine.layer_parts import ACTIVATION_CLASSES, parts_unsupported_reason
from earlyexit_kernels.ops import bare_op

#: Activation of transformers -> its name and variant in oneDNN and torch.
ACTIVATIONS = {
    "GELUActivation": ("gelu", "none"),
    "NewGELUActivation": ("gelu", "tanh"),
    "GELUTanh": ("gelu", "tanh"),
    "ReLU": ("relu", ""),
}


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
#: Part of a layer -> its required type; the activation must be one of `ACTIVATIONS`.
PART_TYPES: dict[str, type[nn.Module] | None] = {
    **dict.fromkeys(("query", "key", "value", "attention_out", "inner", "outer"), nn.Linear),
    **dict.fromkeys(("attention_norm", "norm"), nn.LayerNorm),
    "activation": None,
}


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
    def of(layer: nn.Module, names: LayerNames, heads: int) -> LayerWeights:
        """Return the weights of a layer that `layer_unsupported_reason` accepts."""
        part: dict[str, Any] = {name: layer.get_submodule(getattr(names, name)) for name in PART_TYPES}
        pairs = {
            name: Pair(part[name].weight.detach(), part[name].bias.detach())
            for name, kind in PART_TYPES.items()
            if kind
        }
        eps = [part["attention_norm"].eps, part["norm"].eps]
        return LayerWeights(**pairs, eps=eps, heads=heads, activation=ACTIVATIONS[type(part["activation"]).__name__])

    @property
    def projections(self) -> tuple[Pair, Pair, Pair]:
        """Query, key and value."""
        return self.query, self.key, self.value


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
        joined = Pair(*(torch.cat(each) for each in zip(*weights.projections, strict=True)))
        after = (weights.attention_out, weights.attention_norm, weights.inner, weights.outer, weights.norm)
        products = [joined.weight, weights.attention_out.weight, weights.inner.weight, weights.outer.weight]
        # without oneDNN its names may be missing from torch.ops
        onednn = onednn_unsupported_reason(joined.weight.dtype) is None
        return FusedLayer(
            weights=weights,
            tensors=[*joined, *itertools.chain.from_iterable(after)],
            packed=[torch.ops.mkldnn._reorder_linear_weight(w, None) for w in products] if onednn else [],
            products=PRODUCTS.get(torch.backends.cpu.get_cpu_capability(), PRODUCTS["DEFAULT"]),
            run=bare_op("encoder_layer", backend, "cpu"),
        )

    def __call__(self, hidden: Tensor, *, plan: AttentionPlan) -> Tensor:
        """``[1, T, H] -> [1, T, H]``."""
        x, own = hidden[0], self.weights
        packed = self.packed if x.shape[0] <= self.products.packed_up_to else []
        how = (own.eps, own.heads, *own.activation, self.products.with_activation)
        return self.run(x, self.tensors, packed, *how, *plan.bucket_lists, plan.inverse)[None]


def layer_unsupported_reason(layer: nn.Module, names: LayerNames) -> str | None:
    """Return why `FusedLayer` would compute something else than a layer, or None if it computes the same."""
    checks = {getattr(names, name): functools.partial(_unlike, kind) for name, kind in PART_TYPES.items()}
    return parts_unsupported_reason(layer, checks, attention=names.query.rpartition(".")[0])


def _unlike(kind: type[nn.Module] | None, module: nn.Module) -> str | None:
    """Return why a module is not of a type with weight and bias, or for None not an activation, or None."""
    if kind is None:
        known = type(module) in ACTIVATION_CLASSES and type(module).__name__ in ACTIVATIONS
        return None if known else f"is not one of the activations {sorted(ACTIVATIONS)}"
    if type(module) is not kind or {type(module._parameters.get(n)) for n in Pair._fields} != {nn.Parameter}:
        return f"is not a plain {kind.__name__} with weight and bias"
    return None


def pack_layer(layer: nn.Module, names: LayerNames, config: Any) -> FusedLayer:
    """Pack a layer that `layer_unsupported_reason` accepts."""
    backend = "torch" if available_backends("cpu")["cpp"] else "cpp"
    return FusedLayer.of(LayerWeights.of(layer, names, config.num_attention_heads), backend)


def copied_parameters(layer: nn.Module, names: LayerNames) -> Iterator[Tensor]:
    """Yield the parameters that `FusedLayer.of` copies."""
    for name in ("query", "key", "value", "attention_out", "inner", "outer"):
        linear: Any = layer.get_submodule(getattr(names, name))
        yield linear.weight
        if name in ("query", "key", "value"):
            yield linear.bias
