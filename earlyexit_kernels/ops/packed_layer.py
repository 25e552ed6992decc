"""One encoder layer of BERT's form on packed tokens, from packed weights, by vector kernels of the CPU.

    y = norm(x + out(attend(query x, key x, value x)));  norm(y + outer(activation(inner y)))

Back-end `cpp` computes the whole layer by the kernels of csrc/cpu/kernels, for AVX2 and AVX-512. It adds in an order
that depends on one row alone, so that a row has the same bits in every batch and with every number of threads.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from earlyexit_kernels.backends import extension_function
from earlyexit_kernels.ops.activations import ACTIVATIONS
from earlyexit_kernels.ops.checks import FLOAT32, INT32, check_offsets, check_tensor, check_whole, not_traced
from earlyexit_kernels.ops.encoder_layer import ENCODER_ACTIVATIONS, EncoderWeights
from earlyexit_kernels.ops.schema import PACKED_LAYER, bare_op, define

#: Types that weights can be stored in; everything but the inputs of some products is float32.
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)
#: A weight of int8 is stored as a byte ``x + OFFSET``.
OFFSET = 128
#: Bytes of a line of the cache, and of a huge page.
LINE, HUGE_PAGE = 64, 2 << 20
STORED_AS = {torch.int8: torch.uint8}
PACKED_DTYPES = tuple(STORED_AS.get(dtype, dtype) for dtype in WEIGHT_DTYPES)


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

    >>> import torch
    >>> PackedWeights([torch.zeros(1, 2, 4, 1)], [torch.zeros(1, 4)], [torch.ones(2)]).weights[0].shape  # K 2, N <= 4
    torch.Size([1, 2, 4, 1])
    """

    weights: list[Tensor]
    biases: list[Tensor]
    norms: list[Tensor]


class PackedLayerCall(NamedTuple):
    """The arguments of the bare op, in the order of its schema; `packed_layer` documents them."""

    x: Tensor
    offsets: Tensor
    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    norms: Sequence[Tensor]
    eps: Sequence[float]
    heads: int
    activation: str


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
    """Return the weights of an encoder layer in the layout that `packed_layer` reads on this machine.

    Args:
        weights: of the layer, float32.
        dtype: in which the weights of the four linears are stored: float32, float16, bfloat16, or int8 with a scale
            for each output.

    Raises:
        ValueError: another dtype, of the weights or to store them in.

    >>> import torch
    >>> import earlyexit_kernels as ee
    >>> shapes = [(6, 2), (6,), (2, 2), (2,), (2,), (2,), (4, 2), (4,), (2, 4), (2,), (2,), (2,)]  # H 2, I 4
    >>> packed = ee.ops.pack_weights(ee.ops.EncoderWeights(*map(torch.zeros, shapes)), torch.float16)
    >>> packed.weights[0].dtype, packed.norms[0].shape
    (torch.float16, torch.Size([2]))
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


def _linear(x: Tensor, panels: Tensor, vectors: Tensor, outputs: int) -> Tensor:
    """Return ``x W + b`` of a packed weight; with weights in int8 the rows of x are rounded to int8 too."""
    weight = panels.transpose(1, 2).flatten(2).flatten(0, 1)[:outputs, : x.shape[1]].float()
    if panels.dtype == torch.uint8:
        weight = (weight - OFFSET) * vectors[1, :outputs, None]
        scale = x.abs().amax(dim=1, keepdim=True) / 127
        x = (x / scale.where(scale != 0, 1.0)).round() * scale
    return F.linear(x, weight, vectors[0, :outputs])


def packed_layer_torch(call: PackedLayerCall) -> Tensor:
    """`packed_layer` in torch, row by row, the reference of `cpp`."""
    rows = [_row(call, row) for row in call.x.split(call.offsets.diff().tolist())]
    return torch.cat(rows) if rows else torch.empty_like(call.x)


def _row(call: PackedLayerCall, x: Tensor) -> Tensor:
    """Return the layer of one row ``[S, H]``."""
    tokens, width = x.shape
    inner = call.weights[3].shape[1] * call.weights[3].shape[3]
    qkv, out, first, outer = zip(call.weights, call.biases, (3 * width, width, inner, width), strict=True)
    weight1, bias1, weight2, bias2 = call.norms
    q, k, v = _linear(x, *qkv).view(tokens, 3, call.heads, width // call.heads).permute(1, 2, 0, 3)
    attended = F.scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(tokens, width)
    y = F.layer_norm(x + _linear(attended, *out), (width,), weight1, bias1, call.eps[0])
    z = ACTIVATIONS[call.activation].reference(_linear(y, *first))
    return F.layer_norm(y + _linear(z, *outer), (width,), weight2, bias2, call.eps[1])


def _fake(x, *rest):
    return torch.empty_like(x)


define(
    "packed_layer",
    PACKED_LAYER,
    implementations={"torch": packed_layer_torch},
    call=PackedLayerCall,
    fake=_fake,
    compiled_for=("cpu",),
)


def packed_layer(
    x: Tensor,
    offsets: Tensor,
    *,
    packed: PackedWeights,
    eps: Sequence[float],
    heads: int,
    activation: str = "gelu",
    backend: str = "auto",
) -> Tensor:
    """Return one encoder layer of BERT's form on packed tokens, without dropout.

    Back-end `cpp` requires a processor with AVX2 or AVX-512 and weights that were packed on it. Where weights are
    stored in bfloat16 and the processor multiplies pairs of bfloat16, the inputs of each product are rounded to
    bfloat16 too. With weights in int8 they are rounded to int8, with a scale for each token; among processors with
    AVX-512, only those with AVX512-VNNI take such weights. Everything else is float32.

    Args:
        x: ``[T, H]`` float32 packed tokens.
        offsets: ``[R + 1]`` int32, the first token of each row, and T.
        packed: the weights, from `pack_weights`.
        eps: of the two norms.
        heads: number of attention heads, a divisor of H.
        activation: ``"gelu"``, ``"gelu_tanh"`` or ``"relu"``.
        backend: ``"auto"``, ``"torch"``, or on the CPU ``"cpp"``.

    Returns:
        ``[T, H]`` float32.

    Raises:
        TypeError: an argument is not a tensor or not a whole number where one is required.
        ValueError: shapes, dtypes or devices do not match, an unknown activation, or offsets that decrease or do not
            cover all tokens.
        BackendUnavailableError: `backend` cannot run here.

    >>> import torch
    >>> import earlyexit_kernels as ee
    >>> linear, norm = (torch.eye(2), torch.zeros(2)), (torch.ones(2), torch.zeros(2))
    >>> qkv = torch.cat([torch.eye(2)] * 3), torch.zeros(6)
    >>> packed = ee.ops.pack_weights(ee.ops.EncoderWeights(*qkv, *linear, *norm, *linear, *linear, *norm))
    >>> x, offsets = torch.tensor([[1.0, -1.0], [3.0, 1.0]]), torch.tensor([0, 1, 2], dtype=torch.int32)
    >>> ee.ops.packed_layer(x, offsets, packed=packed, eps=(1e-5, 1e-5), heads=1).round().tolist()
    [[1.0, -1.0], [1.0, -1.0]]
    """
    call = PackedLayerCall(x, offsets, *packed, list(eps), heads, activation)
    _check(call)
    return bare_op("packed_layer", backend, x.device)(*call)


@not_traced
def _check(call: PackedLayerCall) -> None:
    op, x = "packed_layer", call.x
    check_tensor(op, "x", x, (None, None), FLOAT32)
    check_tensor(op, "offsets", call.offsets, (None,), INT32, device=x.device)
    check_whole(op, heads=call.heads)
    tokens, width = x.shape
    if call.heads < 1 or width % call.heads:
        raise ValueError(f"{op}: expected heads to divide {width}, the width of x, got {call.heads}")
    if call.activation not in ENCODER_ACTIVATIONS:
        expected = tuple(ENCODER_ACTIVATIONS)
        raise ValueError(f"{op}: expected activation to be one of {expected}, got {call.activation!r}")
    sizes = [len(each) for each in (call.weights, call.biases, call.norms, call.eps)]
    if sizes != [4, 4, 4, 2]:
        raise ValueError(f"{op}: expected 4 weights, 4 biases, 4 tensors of norms and 2 eps, got {sizes}")
    check_tensor(op, "weights", call.weights[3], (None, None, None, None), PACKED_DTYPES, device=x.device)
    layout, dtype = PanelLayout(*call.weights[3].shape[2:]), call.weights[3].dtype
    vectors = 2 if dtype == torch.uint8 else 1
    inner = call.weights[3].shape[1] * layout.terms
    shapes = ((3 * width, width), (width, width), (inner, width), (width, inner))
    for weight, bias, (outputs, inputs) in zip(call.weights, call.biases, shapes, strict=True):
        panels, steps = -(-outputs // layout.columns), -(-inputs // layout.terms)
        check_tensor(op, "weights", weight, (panels, steps, *layout), (dtype,), device=x.device)
        check_tensor(op, "biases", bias, (vectors, panels * layout.columns), FLOAT32, device=x.device)
    for norm in call.norms:
        check_tensor(op, "norms", norm, (width,), FLOAT32, device=x.device)
    if x.device.type == "cpu":
        check_offsets(op, call.offsets, tokens=tokens)
        if int(call.offsets[0]) or int(call.offsets[-1]) != tokens:
            got = f"{int(call.offsets[0])} to {int(call.offsets[-1])}"
            raise ValueError(f"{op}: expected offsets from 0 to {tokens}, so that every token has a row, got {got}")
