"""The layer on the vector kernels as a function, and its reference in torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from earlyexit_kernels.backends import extension_function
from earlyexit_kernels.cpu.panels import OFFSET, PackedWeights

ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu}


def packed_layer(
    x: Tensor,
    offsets: Tensor,
    *,
    packed: PackedWeights,
    eps: Sequence[float],
    heads: int,
    activation: str = "gelu",
    backend: str,
) -> Tensor:
    """Return the layer of rows of packed tokens, by the kernels (``"cpp"``) or in torch."""
    if backend == "cpp":
        make: Any = extension_function("PackedLayer")
        return make(*packed, list(eps), heads, activation)(x, offsets)
    rows = [_row(each, packed, eps, heads, activation) for each in x.split(offsets.diff().tolist())]
    return torch.cat(rows) if rows else torch.empty_like(x)


def _row(x: Tensor, packed: PackedWeights, eps: Sequence[float], heads: int, activation: str) -> Tensor:
    """Return the layer of one row ``[S, H]``."""
    tokens, width = x.shape
    inner = packed.weights[3].shape[1] * packed.weights[3].shape[3]
    qkv, out, first, outer = zip(packed.weights, packed.biases, (3 * width, width, inner, width), strict=True)
    weight1, bias1, weight2, bias2 = packed.norms
    q, k, v = _linear(x, *qkv).view(tokens, 3, heads, width // heads).permute(1, 2, 0, 3)
    attended = F.scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(tokens, width)
    y = F.layer_norm(x + _linear(attended, *out), (width,), weight1, bias1, eps[0])
    z = ACTIVATIONS[activation](_linear(y, *first))
    return F.layer_norm(y + _linear(z, *outer), (width,), weight2, bias2, eps[1])


def _linear(x: Tensor, panels: Tensor, vectors: Tensor, outputs: int) -> Tensor:
    """Return ``x W + b`` of a packed weight; with weights in int8 the rows of x are rounded to int8 too."""
    weight = panels.transpose(1, 2).flatten(2).flatten(0, 1)[:outputs, : x.shape[1]].float()
    if panels.dtype == torch.uint8:
        weight = (weight - OFFSET) * vectors[1, :outputs, None]
        scale = x.abs().amax(dim=1, keepdim=True) / 127
        x = (x / scale.where(scale != 0, 1.0)).round() * scale
    return F.linear(x, weight, vectors[0, :outputs])
