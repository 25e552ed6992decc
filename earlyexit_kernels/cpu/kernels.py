"""Encoder layers of BERT's form by the vector kernels of csrc/cpu/simd, from weights packed once.

A row has the same bits in every batch, since no sum depends on the other rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from earlyexit_kernels.backbones.forms_bert import OP_ACTIVATIONS, LayerWeights
from earlyexit_kernels.backends import available_backends, extension_function
from earlyexit_kernels.core.attention_plan import AttentionPlan
from earlyexit_kernels.cpu.panels import EncoderWeights, PackedWeights, native_layouts, pack_weights

#: Name of a type of weights -> dtype in which the kernels store them.
STORED = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}


def kernels_unsupported_reason(dtype: torch.dtype, stored: torch.dtype = torch.float32) -> str | None:
    """Return why the vector kernels cannot compute the layers of a model, or None if they can.

    Args:
        dtype: of the model.
        stored: dtype in which the weights are to be stored.
    """
    if dtype != torch.float32:
        return f"they compute in float32, the model is {dtype}"
    if reason := available_backends("cpu")["cpp"]:
        return reason
    layouts = native_layouts()
    if not layouts:
        return "the processor has neither AVX2 nor AVX-512 (or ATEN_CPU_CAPABILITY hides them)"
    if stored in layouts:
        return None
    return (
        f"on a processor with AVX-512, weights in {stored} require AVX512-VNNI, which this one lacks; the kernels for "
        "AVX2 take them (ATEN_CPU_CAPABILITY=avx2)"
    )


def kernels_name() -> str:
    """Return the name of the vector kernels of this processor, ``"avx512"`` or ``"avx2"``, which it must have."""
    describe: Any = extension_function("layer_kernels")
    return describe()["name"].lower().replace("-", "")


def joined(weights: LayerWeights) -> EncoderWeights:
    """Return the weights with query, key and value as one linear, which is a copy."""
    after = (weights.attention_out, weights.attention_norm, weights.inner, weights.outer, weights.norm)
    return EncoderWeights(*weights.qkv(), *itertools.chain.from_iterable(after))


@dataclass(frozen=True)
class PackedLayer:
    """One encoder layer over packed tokens, called as the original one: ``layer(hidden, plan=...)``.

    Attributes:
        packed: the weights; those of the linears and their biases are copies.
        run: ``(hidden, offsets) ->`` the layer, an object of the extension that holds the weights.
    """

    packed: PackedWeights
    run: Callable[[Tensor, Tensor | None], Tensor]

    @staticmethod
    def of(weights: LayerWeights, stored: torch.dtype) -> PackedLayer:
        """Pack the weights of a layer, stored in one of the dtypes of `STORED`."""
        packed, layer = pack_weights(joined(weights), stored), cast(Any, extension_function("PackedLayer"))
        return PackedLayer(packed, layer(*packed, weights.eps, weights.heads, OP_ACTIVATIONS[weights.activation]))

    def __call__(self, hidden: Tensor, *, plan: AttentionPlan) -> Tensor:
        """``[1, T, H] -> [1, T, H]``."""
        return self.run(hidden, plan.ends)
