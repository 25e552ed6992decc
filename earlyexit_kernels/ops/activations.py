"""Activations of the linear ops, as torch functions and as Triton device functions passed to kernels as constexpr."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from earlyexit_kernels.backends import jit, tl


@jit
def unchanged(x):
    return x


@jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@jit
def gelu_tanh(x):
    """``x (1 + tanh u) / 2`` as ``x / (1 + exp(-2 u))``, which avoids cancellation."""
    return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


@jit
def relu(x):
    """NaN stays NaN."""
    return tl.where(x < 0.0, 0.0, x)


@jit
def tanh(x):
    """The exponential form, and the series near 0, where that form cancels."""
    y = x * x
    series = 1.0 + y * (-1.0 / 3 + y * (2.0 / 15 + y * (-17.0 / 315 + y * (62.0 / 2835))))
    return tl.where(y < 0.0625, x * series, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@dataclass(frozen=True)
class Activation:
    """An activation of float32 values.

    Attributes:
        reference: torch function.
        device: Triton function.
    """

    reference: Callable[[Tensor], Tensor]
    device: Any


ACTIVATIONS = {
    "none": Activation(lambda x: x, unchanged),
    "gelu": Activation(F.gelu, gelu),
    "gelu_tanh": Activation(lambda x: F.gelu(x, approximate="tanh"), gelu_tanh),
    "relu": Activation(torch.relu, relu),
    "tanh": Activation(torch.tanh, tanh),
}
