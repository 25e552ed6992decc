"""Linear layer on the first token of each present row: the dense module of a pooler.

An op of the package alone, which calls it raw: exits by their dense module, and embeddings that are made as wide as the
layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from earlyexit_kernels.ops.schema import define
from earlyexit_kernels.ops.shapes import FLOATS, INT32, Argument, Shapes

FIRST_TOKENS_LINEAR = Shapes(
    {
        "hidden": Argument("T, K", FLOATS),
        "weight": Argument("N, K", "hidden"),
        "bias": Argument("N", "hidden"),
        "offsets": Argument("R + 1", INT32),
        "row_ids": Argument("R", INT32),
        "out": Argument("R, N", "hidden", written=True),
    }
)
#: Activations of the op, by name.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": torch.relu,
    "tanh": torch.tanh,
}


@torch.no_grad()
def first_tokens_linear_torch(
    hidden: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, row_ids: Tensor, out: Tensor, activation: str
) -> None:
    """Write ``f(x W^T + b)`` of the first token of each present row, with sums in float32.

    The reference of the compiled kernel, with which the bits of a row do not depend on the other rows.

    Args:
        hidden, weight, bias: the tokens and the layer.
        offsets: non-decreasing; row i starts at ``hidden[offsets[i]]``.
        row_ids: negative for a row that has left or does not exist.
        out: **Changed** for the present rows.
        activation: f, one of `ACTIVATIONS`.
    """
    present = row_ids >= 0
    first = hidden[offsets[:-1][present]].float()
    out[present] = ACTIVATIONS[activation](F.linear(first, weight.float(), bias.float())).to(out.dtype)


define(
    "first_tokens_linear",
    FIRST_TOKENS_LINEAR,
    settings="str activation",
    implementations={"torch": first_tokens_linear_torch},
    compiled_for=("cpu",),
)
