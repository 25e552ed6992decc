"""One encoder layer of BERT's form on packed tokens, in inference on the CPU.

    y = norm(x + out(attend(query x, key x, value x)));  norm(y + outer(activation(inner y)))

`cpp` is the same chain of torch's own kernels as the reference, called from C++: on a short row the way through Python
takes longer than the products.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from earlyexit_kernels.ops.schema import ENCODER_LAYER, define


def product(x: Tensor, weight: Tensor, bias: Tensor, packed: Tensor | None) -> Tensor:
    """``x W + b``."""
    if packed is None:
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def activated(
    x: Tensor, weight: Tensor, bias: Tensor, packed: Tensor | None, name: str, variant: str, in_product: bool
) -> Tensor:
    """``f(x W + b)``: f is ``"gelu"``, variant ``"none"`` or ``"tanh"``, or ``"relu"``; by oneDNN if `in_product`."""
    if packed is not None and in_product:
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, name, [], variant)
    y = product(x, weight, bias, packed)
    return torch.ops.aten.gelu_(y, approximate=variant) if name == "gelu" else y.relu_()


def added(x: Tensor, weight: Tensor, bias: Tensor, packed: Tensor | None, other: Tensor) -> Tensor:
    """``x W + b + other``."""
    if packed is None:
        return F.linear(x, weight, bias).add_(other)
    return torch.ops.mkldnn._linear_pointwise.binary(x, other, packed, bias, "add")


def attend(
    qkv: Tensor,
    heads: int,
    rows: Sequence[int],
    widths: Sequence[int],
    slots: Sequence[Tensor | None],
    masks: Sequence[Tensor | None],
    kept: Sequence[Tensor | None],
    inverse: Tensor | None,
) -> Tensor:
    """Attention bucket by bucket, ``[T, 3 H] -> [T, H]``; `encoder_layer` has the arguments."""
    parts = []
    for count, width, slot, mask, tokens in zip(rows, widths, slots, masks, kept, strict=True):
        x = qkv if slot is None else qkv.index_select(0, slot)
        q, k, v = x.view(count, width, 3, heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(count * width, -1)
        parts.append(out if tokens is None else out.index_select(0, tokens))
    return parts[0] if inverse is None else torch.cat(parts).index_select(0, inverse)


def encoder_layer_torch(
    x, weights, packed, eps, heads, activation, variant, in_product, rows, widths, slots, masks, kept, inverse
) -> Tensor:
    """`encoder_layer` in torch, the reference of `cpp`."""
    qkv_w, qkv_b, out_w, out_b, norm1_w, norm1_b, inner_w, inner_b, outer_w, outer_b, norm2_w, norm2_b = weights
    qkv_p, out_p, inner_p, outer_p = packed or (None,) * 4
    width = x.shape[1:]
    context = attend(product(x, qkv_w, qkv_b, qkv_p), heads, rows, widths, slots, masks, kept, inverse)
    y = F.layer_norm(added(context, out_w, out_b, out_p, x), width, norm1_w, norm1_b, eps[0])
    inner = activated(y, inner_w, inner_b, inner_p, activation, variant, in_product)
    return F.layer_norm(added(inner, outer_w, outer_b, outer_p, y), width, norm2_w, norm2_b, eps[1])


def _fake(x, weights, packed, eps, heads, activation, variant, in_product, rows, widths, slots, masks, kept, inverse):
    return torch.empty_like(x)


#: Back-end -> op. Its arguments, in order: x ``[T, H]``; weights: weight ``[out, in]`` and bias of query, key and value
#: as one, of out, of the first norm, of inner, of outer, of the second norm; packed: the four linears' weights as
#: oneDNN wants them, or nothing for torch's products; eps of the two norms; heads; activation, variant and
#: in_product as in `activated`; then an attention plan: rows, widths, slots, masks and kept of its buckets, and its
#: inverse (`packing`).
ENCODER_LAYERS = define(
    "encoder_layer",
    ENCODER_LAYER,
    fake=_fake,
    implementations={"torch": encoder_layer_torch},
    back_ends=("torch", "cpp"),
)
