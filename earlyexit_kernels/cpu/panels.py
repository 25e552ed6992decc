"""Weights of encoder layers of BERT's form, packed as the vector kernels of csrc/cpu/simd read them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from earlyexit_kernels.backends import extension_function

#: Types that weights can be stored in; everything but the inputs of some products is float32.
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)
#: A weight of int8 is stored as a byte ``x + OFFSET``.
OFFSET = 128
#: Bytes of a line of the cache, and of a huge page.
LINE, HUGE_PAGE = 64, 2 << 20
STORED_AS = {torch.int8: torch.uint8}


class EncoderWeights(NamedTuple):
    """The weights of one encoder layer: query, key and value as one linear, out, inner, outer, and two norms.

    Shapes for width H and inner width I: ``qkv_weight [3 H, H]``, ``out_weight [H, H]``, ``inner_weight [I, H]``,
    ``outer_weight [H, I]``, norms and biases accordingly.
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


class PanelLayout(NamedTuple):
    """How a weight ``[N, K]`` is packed, as ``[N / columns, K / terms, columns, terms]`` with zeros at the ends.

    Attributes:
        columns: outputs of a panel.
        terms: terms of a sum that lie side by side.
    """

    columns: int
    terms: int


class PackedWeights(NamedTuple):
    """The packed weights of one layer: of query, key and value as one linear, out, inner and outer.

    Attributes:
        weights: of the four linears, in a `PanelLayout`.
        biases: of the four linears, ``[1, N]`` float32 with zeros up to whole panels; with weights in int8 ``[2, N]``,
            the second row of which is the scale of each output.
        norms: weight and bias of the first and the second norm, float32.
    """

    weights: list[Tensor]
    biases: list[Tensor]
    norms: list[Tensor]


@functools.cache
def native_layouts() -> dict[torch.dtype, PanelLayout]:
    """Return the layouts that the kernels of this processor read, by dtype of the weights; empty without kernels."""
    describe = extension_function("layer_kernels")
    found = describe() if describe is not None else {}
    if not found:
        return {}
    terms = zip(WEIGHT_DTYPES, found["terms"], strict=True)
    return {dtype: PanelLayout(found["columns"], count) for dtype, count in terms if count}


def pack_weights(weights: EncoderWeights, dtype: torch.dtype = torch.float32) -> PackedWeights:
    """Return the weights of an encoder layer in the layout that the kernels of this machine read.

    Args:
        weights: of the layer, float32.
        dtype: in which the weights of the four linears are stored: float32, float16, bfloat16, or int8 with a scale
            for each output.

    Raises:
        ValueError: another dtype, of the weights or to store them in.
    """
    if dtype not in WEIGHT_DTYPES or {x.dtype for x in weights} != {torch.float32}:
        got = sorted({str(x.dtype) for x in weights})
        raise ValueError(
            f"pack_weights: expected float32 weights, stored in one of {WEIGHT_DTYPES}, got {got} and {dtype}"
        )
    layout = native_layouts().get(dtype, PanelLayout(1, 1))
    w = weights
    linears = [(w.qkv_weight, w.qkv_bias), (w.out_weight, w.out_bias)]
    linears += [(w.inner_weight, w.inner_bias), (w.outer_weight, w.outer_bias)]
    panels, biases = zip(*(_pack(weight, bias, dtype, layout) for weight, bias in linears), strict=True)
    return PackedWeights(_joined(panels), list(biases), [w.norm1_weight, w.norm1_bias, w.norm2_weight, w.norm2_bias])


def _pack(weight: Tensor, bias: Tensor, dtype: torch.dtype, layout: PanelLayout) -> tuple[Tensor, Tensor]:
    """Return the panels of a weight ``[N, K]``, and its bias with the scales."""
    n, k = weight.shape
    vectors, values = [bias], weight
    if dtype == torch.int8:
        scale = weight.abs().amax(dim=1) / 127
        # a scale of 0 stands for a row of zeros; a row that is not finite has no finite scale
        values = (weight / scale.where(scale > 0, 1.0)[:, None]).round().nan_to_num(0.0) + OFFSET
        vectors.append(scale)
    columns, terms = -n % layout.columns, -k % layout.terms
    padded = F.pad(values.to(STORED_AS.get(dtype, dtype)), (0, terms, 0, columns))
    panels = padded.view(-1, layout.columns, padded.shape[1] // layout.terms, layout.terms).transpose(1, 2)
    return panels, F.pad(torch.stack(vectors), (0, columns))


def _joined(panels: Sequence[Tensor]) -> list[Tensor]:
    """Return contiguous copies, those of a large layer in one buffer of huge pages where the system has them."""
    sizes = [-(-x.nbytes // LINE) * LINE for x in panels]
    if sum(sizes) < HUGE_PAGE:
        return [x.contiguous() for x in panels]
    buffer = torch.empty(sum(sizes) + HUGE_PAGE, dtype=torch.uint8)
    start = -buffer.data_ptr() % HUGE_PAGE
    if (prefer_huge_pages := extension_function("prefer_huge_pages")) is not None:
        prefer_huge_pages(buffer.data_ptr() + start, sum(sizes))
    parts = buffer[start : start + sum(sizes)].split(sizes)
    copies = [part[: x.nbytes].view(x.dtype).view(x.shape) for part, x in zip(parts, panels, strict=True)]
    for copy, x in zip(copies, panels, strict=True):
        copy.copy_(x)
    return copies
