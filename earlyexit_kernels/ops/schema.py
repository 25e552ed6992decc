"""The definition of the ops in torch: one schema per op for all back-ends, and their implementations.

A dispatch key holds one implementation, so each back-end has its own op: ``earlyexit_kernels::exit_step_torch``,
``..._triton``, ``..._cpp``. The compiled extension registers its ``_cpp`` kernels itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from earlyexit_kernels.backends import NAMESPACE, resolve
from earlyexit_kernels.ops.shapes import Shapes

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_DISPATCH_KEYS = {"torch": ("CompositeExplicitAutograd",), "triton": ("CPU", "CUDA")}
#: Op -> back-end -> callable.
_OPS: dict[str, dict[str, Callable[..., Any]]] = {}
#: Op -> its tensors.
SHAPES: dict[str, Shapes] = {}
#: Op -> kinds of device that its compiled kernel supports.
_COMPILED_FOR: dict[str, tuple[str, ...]] = {}


def _returns_nothing(*arguments: Any) -> None:
    return None


def on_its_device(launch: Callable) -> Callable:
    """Return `launch` on the device of its first tensor argument; Triton launches on the current device."""

    @functools.wraps(launch)
    def run(*arguments: Any) -> Any:
        with torch.cuda.device_of(next(x for x in arguments if isinstance(x, torch.Tensor))):
            return launch(*arguments)

    return run


def _named(launch: Callable, call: Callable | None) -> Callable:
    return launch if call is None else lambda *arguments: launch(call(*arguments))


def define(
    op: str,
    shapes: Shapes,
    *,
    settings: str = "",
    returns: str = "()",
    implementations: Mapping[str, Callable],
    call: Callable | None = None,
    fake: Callable = _returns_nothing,
    compiled_for: tuple[str, ...] = (),
) -> None:
    """Define `op` for its back-ends and register its Python implementations.

    Args:
        op: name without the suffix of the back-end.
        shapes: its tensors, which come first.
        settings: the other arguments, and
        returns: what it returns, in the language of torch's schemas.
        implementations: back-end -> Python function, in the order of `BACKENDS`; ``cpp`` registers its own.
        call: named tuple of the arguments, which the Python functions take as one. Default: they take all arguments.
        fake: shapes and dtypes of the returns on fake tensors. Default: an op that returns nothing.
        compiled_for: kinds of device for which the compiled extension has a kernel.
    """
    _COMPILED_FOR[op], _OPS[op], SHAPES[op] = compiled_for, {}, shapes
    schema = f"({', '.join([*shapes.schema(), *([settings] if settings else [])])}) -> {returns}"
    for backend in (*implementations, *(("cpp",) if compiled_for else ())):
        name = f"{op}_{backend}"
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
        for key in _DISPATCH_KEYS.get(backend, ()):
            launch = _named(implementations[backend], call)
            _LIBRARY.impl(name, on_its_device(launch) if key == "CUDA" else launch, key)
        _OPS[op][backend] = getattr(getattr(torch.ops, NAMESPACE), name).default


def op_of(op: str, backend: str) -> Callable[..., Any]:
    """Return an op of a back-end that is known to have it and to run here."""
    return _OPS[op][backend]


def raw(op: str, backend: str, device: str | torch.device) -> Callable[..., Any]:
    """Return an op of a back-end without the input checks of its public function.

    For loops that call an op at every layer on tensors that they have made themselves. Invalid arguments are undefined
    behaviour. The arguments are those of the op's schema, by position or by name.

    Args:
        op: name of a function of `earlyexit_kernels.ops`.
        backend: ``"auto"`` or the name of a back-end.
        device: of the tensors, or its kind: ``"cpu"``, or ``"cuda"`` for the current GPU.

    Raises:
        ValueError: the op does not exist, or does not have this back-end on this kind of device.
        BackendUnavailableError: the back-end cannot run here.

    >>> import torch
    >>> import earlyexit_kernels as ee
    >>> plan = ee.ops.raw("compact", "torch", "cpu")
    >>> row_ids, offsets = torch.tensor([-1, 1], dtype=torch.int32), torch.tensor([0, 2, 5], dtype=torch.int32)
    >>> [x.tolist() for x in plan(row_ids, offsets)]
    [[1, -1], [0, 3, 3], [1, -1]]
    """
    if op not in _OPS:
        raise ValueError(f"raw: expected op to be one of {sorted(_OPS)}, got {op!r}")
    return _OPS[op][resolve(backend, device, _back_ends(op, device))]


def _back_ends(op: str, device: str | torch.device) -> tuple[str, ...]:
    """Return the back-ends that have `op` on a device."""
    names, kind = tuple(_OPS[op]), device if isinstance(device, str) else device.type
    return names if kind in _COMPILED_FOR[op] else tuple(name for name in names if name != "cpp")
