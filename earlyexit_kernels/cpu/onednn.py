"""Matrix products by oneDNN, from weights that it packed once.

oneDNN caches each product by its number of tokens, so memory grows until all token counts up to
`Products.packed_up_to`, or 1024 products in all, have occurred. The environment variable
ONEDNN_PRIMITIVE_CACHE_CAPACITY sets a lower limit. Token counts are not rounded up, because the added tokens would slow
the products down.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


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


#: CPU capability as torch names it -> products; measured by the suite `layer_products`.
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
class PackedLinear:
    """A linear.

    Attributes:
        weight, bias: of the module, or copies of several side by side.
        packed: the weight in oneDNN's layout (a copy), or None without oneDNN.
        products: how products are computed.
    """

    weight: Tensor
    bias: Tensor | None
    packed: Tensor | None
    products: Products

    @staticmethod
    def of(weight: Tensor, bias: Tensor | None, products: Products) -> PackedLinear:
        """Pack the weight of a linear."""
        # without oneDNN its names may be missing from torch.ops
        onednn = onednn_unsupported_reason(weight.dtype) is None
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, None) if onednn else None
        return PackedLinear(weight, bias, packed, products)

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``x W + b`` for ``[T, ...]``."""
        if self.packed is None or x.shape[0] > self.products.packed_up_to:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise.default(x, self.packed, self.bias, "none", [], "")

    def added(self, x: Tensor, other: Tensor) -> Tensor:
        """Return ``x W + b + other``."""
        if self.packed is None or x.shape[0] > self.products.packed_up_to:
            return F.linear(x, self.weight, self.bias).add_(other)
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.packed, self.bias, "add")

    def activated(self, x: Tensor, name: str, variant: str) -> Tensor:
        """Return ``f(x W + b)``, f as in `forms_bert.ACTIVATIONS`."""
        if self.products.with_activation and self.packed is not None and x.shape[0] <= self.products.packed_up_to:
            return torch.ops.mkldnn._linear_pointwise.default(x, self.packed, self.bias, name, [], variant)
        y = self(x)
        return torch.ops.aten.gelu_(y, approximate=variant) if name == "gelu" else y.relu_()
