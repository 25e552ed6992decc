"""Encoder layers of BERT's form by the vector kernels of `ops.packed_layer`, from weights packed once.

A row has the same bits in every batch, since no sum depends on the other rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from earlyexit_kernels.backends import available_backends, extension_function
from earlyexit_kernels.engine.attention_plan import AttentionPlan
from earlyexit_kernels.engine.bert_weights import OP_ACTIVATIONS, LayerWeights
from earlyexit_kernels.ops import PackedWeights, bare_op, pack_weights
from earlyexit_kernels.ops.packed_layer import native_layouts

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


@dataclass(frozen=True)
class PackedLayer:
    """One encoder layer over packed tokens, called as the original one: ``layer(hidden, plan=...)``.

    Attributes:
        packed: the weights; those of the linears and their biases are copies.
        eps: of the two norms.
        heads: number of attention heads.
        activation: name in the op.
        run: the op.
    """

    packed: PackedWeights
    eps: list[float]
    heads: int
    activation: str
    run: Callable[..., Tensor]

    @staticmethod
    def of(weights: LayerWeights, stored: torch.dtype) -> PackedLayer:
        """Pack the weights of a layer, stored in one of the dtypes of `STORED`."""
        packed, run = pack_weights(weights.joined(), stored), bare_op("packed_layer", "cpp", "cpu")
        return PackedLayer(packed, weights.eps, weights.heads, OP_ACTIVATIONS[weights.activation], run)

    def __call__(self, hidden: Tensor, *, plan: AttentionPlan) -> Tensor:
        """``[1, T, H] -> [1, T, H]``."""
        x = hidden[0].contiguous()
        return self.run(x, plan.ends, *self.packed, self.eps, self.heads, self.activation)[None]
