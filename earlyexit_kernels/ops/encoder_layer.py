"""One encoder layer of BERT's form on packed tokens, for inference on the CPU.

    y = norm(x + out(attend(query x, key x, value x)));  norm(y + outer(activation(inner y)))

Back-end `cpp` runs the same chain of torch kernels as the reference, called from C++: for short rows the overhead of
Python exceeds the time of the products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from earlyexit_kernels.ops.checks import COPIED, INT64, check_tensor, check_whole, not_traced
from earlyexit_kernels.ops.schema import ENCODER_LAYER, bare_op, define

#: Activation -> its name and variant in oneDNN and torch.
ENCODER_ACTIVATIONS = {"gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "relu": ("relu", "")}
#: Weights that oneDNN packs.
PACKED = ("qkv_weight", "out_weight", "inner_weight", "outer_weight")


class EncoderWeights(NamedTuple):
    """The weights of one encoder layer: query, key and value as one linear, out, inner, outer, and two norms.

    Shapes for width H and inner width I: ``qkv_weight [3 H, H]``, ``out_weight [H, H]``, ``inner_weight [I, H]``,
    ``outer_weight [H, I]``, norms and biases accordingly.

    >>> shapes = [(6, 2), (6,), (2, 2), (2,), (2,), (2,), (4, 2), (4,), (2, 4), (2,), (2,), (2,)]  # H 2, I 4
    >>> EncoderWeights(*map(torch.zeros, shapes)).inner_weight.shape
    torch.Size([4, 2])
    """

    qkv_weight: Tensor
    qkv_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor
    norm1_weight: Tensor
    norm1_bias: Tensor
    inner_weight: Tensor
    inner_bias: Tensor
    outer_weight: Tensor
    outer_bias: Tensor
    norm2_weight: Tensor
    norm2_bias: Tensor


class EncoderLayerCall(NamedTuple):
    """The arguments of the bare op, in the order of its schema; `encoder_layer` documents them."""

    x: Tensor
    weights: Sequence[Tensor]
    packed: Sequence[Tensor]
    eps: Sequence[float]
    heads: int
    activation: str
    variant: str
    in_product: bool
    rows: Sequence[int]
    widths: Sequence[int]
    slots: Sequence[Tensor | None]
    masks: Sequence[Tensor | None]
    kept: Sequence[Tensor | None]
    inverse: Tensor | None


def product(x: Tensor, weight: Tensor, bias: Tensor, packed: Tensor | None) -> Tensor:
    """Return ``x W + b``."""
    if packed is None:
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def activated_product(call: EncoderLayerCall, x: Tensor, weight: Tensor, bias: Tensor, packed: Tensor | None) -> Tensor:
    """Return ``f(x W + b)`` with the activation of the call, computed by oneDNN if `call.in_product`."""
    if packed is not None and call.in_product:
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, call.activation, [], call.variant)
    y = product(x, weight, bias, packed)
    return torch.ops.aten.gelu_(y, approximate=call.variant) if call.activation == "gelu" else y.relu_()


def added_product(x: Tensor, weight: Tensor, bias: Tensor, packed: Tensor | None, other: Tensor) -> Tensor:
    """Return ``x W + b + other``."""
    if packed is None:
        return F.linear(x, weight, bias).add_(other)
    return torch.ops.mkldnn._linear_pointwise.binary(x, other, packed, bias, "add")


def attend(call: EncoderLayerCall, qkv: Tensor) -> Tensor:
    """Return attention bucket by bucket, ``[T, 3 H] -> [T, H]``."""
    parts = []
    for rows, width, slots, mask, kept in zip(call.rows, call.widths, call.slots, call.masks, call.kept, strict=True):
        x = qkv if slots is None else qkv.index_select(0, slots)
        q, k, v = x.view(rows, width, 3, call.heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(rows * width, -1)
        parts.append(out if kept is None else out.index_select(0, kept))
    return parts[0] if call.inverse is None else torch.cat(parts).index_select(0, call.inverse)


def encoder_layer_torch(call: EncoderLayerCall) -> Tensor:
    """`encoder_layer` in torch, the reference of `cpp`."""
    x, w = call.x, EncoderWeights(*call.weights)
    qkv, out, inner, outer = call.packed or (None,) * len(PACKED)
    width = x.shape[1:]
    context = attend(call, product(x, w.qkv_weight, w.qkv_bias, qkv))
    y = added_product(context, w.out_weight, w.out_bias, out, x)
    y = F.layer_norm(y, width, w.norm1_weight, w.norm1_bias, call.eps[0])
    z = activated_product(call, y, w.inner_weight, w.inner_bias, inner)
    z = added_product(z, w.outer_weight, w.outer_bias, outer, y)
    return F.layer_norm(z, width, w.norm2_weight, w.norm2_bias, call.eps[1])


def _fake(x, *rest):
    return torch.empty_like(x)


define(
    "encoder_layer",
    ENCODER_LAYER,
    implementations={"torch": encoder_layer_torch},
    call=EncoderLayerCall,
    fake=_fake,
    compiled_for=("cpu",),
)


def encoder_layer(
    x: Tensor,
    *,
    weights: EncoderWeights,
    eps: Sequence[float],
    heads: int,
    rows: Sequence[int],
    widths: Sequence[int],
    slots: Sequence[Tensor | None] | None = None,
    masks: Sequence[Tensor | None] | None = None,
    kept: Sequence[Tensor | None] | None = None,
    inverse: Tensor | None = None,
    activation: str = "gelu",
    packed: Sequence[Tensor] = (),
    in_product: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Return one encoder layer of BERT's form on packed tokens, without dropout.

    Attention runs over buckets of rows of similar length; bucket i is a rectangle of ``rows[i]`` times ``widths[i]``
    slots, each of which holds a token.

    Args:
        x: ``[T, H]`` packed tokens.
        weights: of the layer, dtype of `x`.
        eps: of the two norms.
        heads: number of attention heads, a divisor of H.
        rows, widths: size of each bucket.
        slots: for each bucket the token in each slot ``[rows * width]`` int64, or None if the tokens are the rectangle.
        masks: for each bucket ``[rows, 1, 1, width]`` bool, False for filler slots, or None without fillers.
        kept: for each bucket the slots that are not fillers, int64, or None without fillers.
        inverse: ``[T]`` int64, position of each token among the kept slots of all buckets, or None if in order.
        activation: ``"gelu"``, ``"gelu_tanh"`` or ``"relu"``.
        packed: the weights of qkv, out, inner and outer in oneDNN's layout, or nothing for torch's products.
        in_product: whether oneDNN computes the activation within the packed product.
        backend: ``"auto"``, ``"torch"``, or on the CPU ``"cpp"``.

    Returns:
        ``[T, H]``.

    Raises:
        TypeError: an argument is not a tensor or not a whole number where one is required.
        ValueError: shapes, dtypes, devices or the numbers of buckets do not match, or an unknown activation; on the CPU
            also an index out of range.
        BackendUnavailableError: `backend` cannot run here.

    >>> import torch
    >>> import earlyexit_kernels as ee
    >>> linear, norm = (torch.eye(2), torch.zeros(2)), (torch.ones(2), torch.zeros(2))
    >>> qkv = torch.cat([torch.eye(2)] * 3), torch.zeros(6)
    >>> weights = ee.ops.EncoderWeights(*qkv, *linear, *norm, *linear, *linear, *norm)
    >>> x = torch.tensor([[1.0, -1.0], [3.0, 1.0]])
    >>> ee.ops.encoder_layer(x, weights=weights, eps=(1e-5, 1e-5), heads=1, rows=[2], widths=[1]).round().tolist()
    [[1.0, -1.0], [1.0, -1.0]]
    """
    op = "encoder_layer"
    absent: list[Tensor | None] = [None] * len(rows)
    if activation not in ENCODER_ACTIVATIONS:
        raise ValueError(f"{op}: expected activation to be one of {tuple(ENCODER_ACTIVATIONS)}, got {activation!r}")
    name, variant = ENCODER_ACTIVATIONS[activation]
    call = EncoderLayerCall(
        x, list(weights), list(packed), list(eps), heads, name, variant, in_product, rows, widths,
        slots=absent if slots is None else slots,
        masks=absent if masks is None else masks,
        kept=absent if kept is None else kept,
        inverse=inverse,
    )  # fmt: skip
    _check(op, call)
    return bare_op(op, backend, x.device)(*call)


@not_traced
def _check(op: str, call: EncoderLayerCall) -> None:
    x = call.x
    check_tensor(op, "x", x, (None, None), COPIED)
    width = x.shape[1]
    check_whole(op, heads=call.heads)
    if call.heads < 1 or width % call.heads:
        raise ValueError(f"{op}: expected heads to divide {width}, the width of x, got {call.heads}")
    if len(call.weights) != len(EncoderWeights._fields) or len(call.packed) not in (0, len(PACKED)):
        got = f"{len(call.weights)} and {len(call.packed)}"
        raise ValueError(
            f"{op}: expected {len(EncoderWeights._fields)} weights, and {len(PACKED)} packed or none, got {got}"
        )
    if len(call.eps) != 2:
        raise ValueError(f"{op}: expected eps of 2 norms, got {len(call.eps)}")
    w = EncoderWeights(*call.weights)
    check_tensor(op, "inner_weight", w.inner_weight, (None, width), (x.dtype,), device=x.device)
    inner = w.inner_weight.shape[0]
    outputs = {"qkv": 3 * width, "out": width, "norm1": width, "inner": inner, "outer": width, "norm2": width}
    inputs = {"qkv": width, "out": width, "outer": inner}
    for name, size in outputs.items():
        check_tensor(op, f"{name}_bias", getattr(w, f"{name}_bias"), (size,), (x.dtype,), device=x.device)
        shape = (size, inputs[name]) if name in inputs else (size,) if name.startswith("norm") else (size, width)
        check_tensor(op, f"{name}_weight", getattr(w, f"{name}_weight"), shape, (x.dtype,), device=x.device)
    _check_buckets(op, call)


def _check_buckets(op: str, call: EncoderLayerCall) -> None:
    """Check that every token comes out of the buckets once."""
    tokens, device = call.x.shape[0], call.x.device
    sizes = [len(each) for each in (call.rows, call.widths, call.slots, call.masks, call.kept)]
    if len(set(sizes)) > 1 or not sizes[0]:
        raise ValueError(f"{op}: expected rows, widths, slots, masks and kept of each bucket, got lengths {sizes}")
    count = 0
    for rows, width, slots, mask, kept in zip(*call[-6:-1], strict=True):
        check_whole(op, rows=rows, widths=width)
        size = rows * width
        if rows < 1 or width < 1 or (slots is None and size != tokens):
            raise ValueError(f"{op}: expected a bucket of {tokens} tokens without slots, got {rows} rows of {width}")
        if mask is not None:
            check_tensor(op, "masks", mask, (rows, 1, 1, width), (torch.bool,), device=device)
        for name, index, length, limit in (("slots", slots, size, tokens), ("kept", kept, None, size)):
            if index is not None:
                _check_index(op, name, index, length, limit, device)
        count += size if kept is None else kept.shape[0]
    if count != tokens or (len(call.rows) > 1 and call.inverse is None):
        raise ValueError(f"{op}: expected buckets of {tokens} kept slots, and inverse for several, got {count}")
    if call.inverse is not None:
        _check_index(op, "inverse", call.inverse, tokens, tokens, device)


def _check_index(op: str, name: str, index: Tensor, length: int | None, limit: int, device: torch.device) -> None:
    check_tensor(op, name, index, (length,), INT64, device=device)
    if device.type == "cpu" and index.numel() and not (int(index.min()) >= 0 and int(index.max()) < limit):
        raise ValueError(f"{op}: expected {name} in [0, {limit - 1}], got {int(index.min())} to {int(index.max())}")
