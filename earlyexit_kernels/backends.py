"""The three back-ends of the ops: which can run here, why the others can't, and which one `auto` takes.

`torch` is the readable reference and runs everywhere. `triton` runs on CUDA tensors, and on CPU tensors only under its
interpreter (``TRITON_INTERPRET=1`` set before the first import). `cpp` is the compiled extension.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Any

import torch

from earlyexit_kernels.errors import BackendUnavailableError

logger = logging.getLogger("earlyexit_kernels")

BACKENDS = ("torch", "triton", "cpp")
NAMESPACE = "earlyexit_kernels"


#: Integers that a kernel is compiled without: sizes of a batch and places in a loop, or a batch of 1 row and one of 16
#: would each have kernels of their own, and a row not surely the same bits in all of them.
_TAKEN_AS_THEY_COME = ("rows", "present", "capacity", "layer", "depth")


def _undecorated(fn: Any) -> Any:
    return fn


try:
    import triton

    tl: Any = importlib.import_module("triton.language")
    jit: Callable[[Any], Any] = functools.partial(triton.jit, do_not_specialize=_TAKEN_AS_THEY_COME)
    _TRITON_MISSING = ""
except ImportError as error:
    tl, jit = None, _undecorated
    _TRITON_MISSING = f"triton can't be imported ({error}); install triton>=3.6 (Linux)"

#: Triton decides at decoration time, so a later change of the variable has no effect.
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _load_extension() -> str:
    if importlib.util.find_spec("earlyexit_kernels._C") is None:
        return "the extension isn't built; run `make build`, or reinstall with a C++ compiler and EARLYEXIT_BUILD=auto"
    try:
        importlib.import_module("earlyexit_kernels._C")
    except ImportError as error:
        return f"the extension was built for another torch or Python ({error}); rebuild it with `make build`"
    return ""


_EXTENSION_MISSING = _load_extension()


def _why_not_torch(device: str) -> str:
    return ""


def _why_not_triton(device: str) -> str:
    if _TRITON_MISSING:
        return _TRITON_MISSING
    if device == "cpu" and not TRITON_INTERPRETED:
        return "triton runs on CPU tensors only interpreted; set TRITON_INTERPRET=1 before the first import"
    if device == "cuda" and TRITON_INTERPRETED:
        return "TRITON_INTERPRET=1 keeps triton on the CPU; unset it before the first import"
    return ""


def _why_not_cpp(device: str) -> str:
    if _EXTENSION_MISSING:
        return _EXTENSION_MISSING
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device)
    if key is None or not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::exit_step_cpp", key):
        return f"the extension was built without {device} kernels"
    return ""


_WHY_NOT = {"torch": _why_not_torch, "triton": _why_not_triton, "cpp": _why_not_cpp}
_PREFERENCE = {"cpu": ("cpp", "torch"), "cuda": ("cpp", "triton", "torch")}


def available_backends(device: str | torch.device | None = None) -> dict[str, str]:
    """Tell which back-ends can run on a kind of device.

    Args:
        device: ``"cpu"`` or ``"cuda"``; default: ``"cuda"`` where torch sees one, else ``"cpu"``.

    Returns:
        Back-end name -> ``""`` where it runs, else the reason it doesn't and the cure.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = torch.device(device).type
    return {name: why(kind) for name, why in _WHY_NOT.items()}


_CHOICES: dict[tuple[str, str, tuple[str, ...]], str] = {}


@torch.compiler.assume_constant_result
def resolve(backend: str, device: str, among: tuple[str, ...] = BACKENDS) -> str:
    """Choose the back-end for tensors of one kind of device.

    Args:
        backend: ``"auto"`` or the name of a back-end.
        device: kind of device, ``"cpu"`` or ``"cuda"``.
        among: the back-ends that the op has.

    Raises:
        ValueError: an unknown name, or a back-end that the op doesn't have.
        BackendUnavailableError: a back-end asked for by name can't run here.
    """
    asked = backend, device, among
    if asked not in _CHOICES:
        _CHOICES[asked] = _choose(*asked)
    return _CHOICES[asked]


def _choose(backend: str, device: str, among: tuple[str, ...]) -> str:
    if backend not in ("auto", *among):
        raise ValueError(f"backend: expected one of {('auto', *among)}, got {backend!r}")
    if backend != "auto":
        reason = _WHY_NOT[backend](device)
        if reason:
            raise BackendUnavailableError(f"backend {backend!r} can't run on {device} tensors: {reason}")
        return backend
    passed_over: list[str] = []
    for name in _PREFERENCE.get(device, ("torch",)):
        if name not in among:
            continue
        reason = _WHY_NOT[name](device)
        if not reason:
            level = logging.WARNING if passed_over else logging.INFO
            logger.log(level, "backend 'auto' chose %r on %s%s", name, device, "".join(passed_over))
            return name
        passed_over.append(f"; not {name!r}: {reason}")
    raise AssertionError("torch runs everywhere")
