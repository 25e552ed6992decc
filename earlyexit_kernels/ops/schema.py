"""The ops' schemas, one string each for all back-ends, and how an implementation joins them.

One dispatch key holds one implementation, so each back-end has its own op name: ``earlyexit_kernels::exit_step_torch``,
``..._triton``, ``..._cpp``. The compiled extension registers its ``_cpp`` kernels itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from earlyexit_kernels.backends import BACKENDS, NAMESPACE

EXIT_STEP = (
    "(Tensor? hidden, Tensor? offsets, Tensor? weight, Tensor? bias, Tensor? logits, Tensor? aux, "
    "Tensor(a!) row_ids, Tensor(b!) state, Tensor(c!) answers, Tensor(d!) exit_layer, "
    "str criterion, float[] params, str pooling, int layer, int depth) -> Tensor"
)
#: exit_step and what follows it in a loop that the host doesn't watch.
RESIDENT_EXIT = (
    "(Tensor? hidden, Tensor? weight, Tensor? bias, Tensor? logits, Tensor? aux, Tensor(a!) row_ids, "
    "Tensor(b!) offsets, Tensor(c!) old_offsets, Tensor(d!) source, Tensor(e!) counts, Tensor(f!) state, "
    "Tensor(g!) answers, Tensor(h!) exit_layer, str criterion, float[] params, str pooling, int layer, int depth, "
    "int tile, int capacity, int handle) -> ()"
)
COMPACT = "(Tensor row_ids, Tensor offsets) -> (Tensor, Tensor, Tensor)"
ENCODER_LAYER = (
    "(Tensor x, Tensor[] weights, Tensor[] packed, float[] eps, int heads, str activation, str variant, "
    "bool in_product, int[] rows, int[] widths, Tensor?[] slots, Tensor?[] masks, Tensor?[] kept, "
    "Tensor? inverse) -> Tensor"
)
GATHER_ROWS = "(Tensor hidden, Tensor offsets, Tensor source, Tensor new_offsets, Tensor(a!) out) -> ()"
PACK_TOKENS = (
    "(Tensor batch, Tensor ids, Tensor mask, Tensor positions, Tensor types, Tensor(a!) found, Tensor(b!) row_ids, "
    "Tensor(c!) offsets, Tensor(d!) tokens, Tensor(e!) counts) -> ()"
)
ROWS_LINEAR = (
    "(Tensor x, Tensor[] weights, Tensor[] biases, Tensor offsets, Tensor(a!) out, str activation, bool absolute) -> ()"
)
FIRST_TOKENS_LINEAR = (
    "(Tensor hidden, Tensor weight, Tensor bias, Tensor offsets, Tensor row_ids, Tensor(a!) out, str activation) -> ()"
)
ROWS_ATTENTION = "(Tensor qkv, Tensor offsets, Tensor row_ids, int heads, int longest, Tensor(a!) out) -> ()"
ROWS_ADD_NORM = (
    "(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps, Tensor offsets, Tensor(a!) out, "
    "bool residual_absolute, bool out_absolute) -> ()"
)

#: Back-ends of an op that has no compiled kernel.
PYTHON_BACK_ENDS = ("torch", "triton")

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_DISPATCH_KEYS = {"torch": ("CompositeExplicitAutograd",), "triton": ("CPU", "CUDA")}


def _returns_nothing(*arguments: Any) -> None:
    return None


def on_its_device(launch: Callable) -> Callable:
    """A launcher that runs where its first tensor is: Triton takes the current device, wherever the tensors are."""

    @functools.wraps(launch)
    def run(*arguments: Any) -> Any:
        with torch.cuda.device_of(next(x for x in arguments if isinstance(x, torch.Tensor))):
            return launch(*arguments)

    return run


def define(
    op: str,
    schema: str,
    *,
    fake: Callable = _returns_nothing,
    implementations: Mapping[str, Callable],
    back_ends: Sequence[str] = BACKENDS,
) -> dict[str, Any]:
    """Define `op` for its back-ends and attach its Python implementations.

    Args:
        op: name without the back-end's suffix.
        schema: arguments and returns, mutation declared.
        fake: shapes and dtypes of the returns, on fake tensors; default: of an op that returns nothing.
        implementations: Python function by back-end; ``cpp`` registers its own.
        back_ends: that have the op.

    Returns:
        The callable op of each back-end.
    """
    ops = {}
    for backend in back_ends:
        name = f"{op}_{backend}"
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
        for key in _DISPATCH_KEYS.get(backend, ()):
            launch = implementations[backend]
            _LIBRARY.impl(name, on_its_device(launch) if key == "CUDA" else launch, key)
        ops[backend] = getattr(getattr(torch.ops, NAMESPACE), name).default
    return ops
