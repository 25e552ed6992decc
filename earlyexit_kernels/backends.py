"""The back-ends of the ops: which of them can run here, and which one `auto` chooses.

`torch` is the reference and runs everywhere. `triton` runs on CUDA tensors, and on CPU tensors only under its
interpreter (``TRITON_INTERPRET=1`` set before the first import). `cpp` is the compiled extension.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from earlyexit_kernels.errors import BackendUnavailableError

logger = logging.getLogger("earlyexit_kernels")

BACKENDS = ("torch", "triton", "cpp")
#: Namespace of the ops, ``torch.ops.earlyexit_kernels``.
NAMESPACE = "earlyexit_kernels"

#: Integer arguments that Triton does not specialise kernels on. Otherwise batches of 1 and of 16 rows would run
#: different kernels, in which a row might round differently.
_NOT_SPECIALIZED = ("rows", "present", "layer", "depth")


def _undecorated(fn: Any) -> Any:
    return fn


try:
    import triton

    tl: Any = importlib.import_module("triton.language")
    jit: Callable[[Any], Any] = functools.partial(triton.jit, do_not_specialize=_NOT_SPECIALIZED)
    _TRITON_MISSING = ""
except ImportError as error:
    tl, jit = None, _undecorated
    _TRITON_MISSING = f"triton cannot be imported ({error}); install triton>=3.6 (Linux)"


def constant(value: float) -> Any:
    """Return a module constant that Triton functions can read: a compile-time constant, or `value` without Triton."""
    return value if tl is None else tl.constexpr(value)


#: Triton reads the variable when a kernel is decorated, so a later change has no effect.
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _load_extension() -> str:
    if importlib.util.find_spec("earlyexit_kernels._C") is None:
        return (
            f"the extension is not built in {Path(__file__).parent}; run `make build` in a checkout, or reinstall with "
            "a C++ compiler and EARLYEXIT_BUILD=cpu, or cuda, which end with the compiler's error where it fails"
        )
    try:
        importlib.import_module("earlyexit_kernels._C")
    except ImportError as error:
        return f"the extension was built for another torch or Python ({error}); rebuild it with `make build`"
    return ""


_EXTENSION_MISSING = _load_extension()


def extension_function(name: str) -> Callable[..., Any] | None:
    """Return a function of the compiled extension, or None without it."""
    return None if _EXTENSION_MISSING else getattr(importlib.import_module("earlyexit_kernels._C"), name)


def _triton_unavailable_reason(device: str) -> str:
    if _TRITON_MISSING:
        return _TRITON_MISSING
    if device == "cpu" and not TRITON_INTERPRETED:
        return "triton runs on CPU tensors only under its interpreter; set TRITON_INTERPRET=1 before the first import"
    if device == "cuda" and TRITON_INTERPRETED:
        return "TRITON_INTERPRET=1 restricts triton to the CPU; unset it before the first import"
    return ""


def _cpp_unavailable_reason(device: str) -> str:
    if _EXTENSION_MISSING:
        return _EXTENSION_MISSING
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device)
    if key is None or not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::exit_step_cpp", key):
        return f"the extension was built without {device} kernels"
    return ""


_UNAVAILABLE_REASONS: dict[str, Callable[[str], str]] = {
    "torch": lambda device: "",
    "triton": _triton_unavailable_reason,
    "cpp": _cpp_unavailable_reason,
}
#: Kind of device -> back-ends that `auto` tries, in order.
_PREFERENCE = {"cpu": ("cpp", "torch"), "cuda": ("cpp", "triton", "torch")}


def _not_tested(backend: str, device: torch.device) -> str:
    return ""


_self_test: Callable[[str, torch.device], str] = _not_tested


def register_self_test(test: Callable[[str, torch.device], str]) -> None:
    """Set the function that returns why a back-end does not work on a device, ``""`` if it does."""
    global _self_test
    _self_test = test


def _unavailable_reason(name: str, device: torch.device) -> str:
    """Return why a back-end cannot run on a device: it cannot be imported, or failed its self-test."""
    return _UNAVAILABLE_REASONS[name](device.type) or _self_test(name, device)


def available_backends(device: str | torch.device | None = None) -> dict[str, str]:
    """Return which back-ends can run on a device: those that can be imported and pass the self-test there.

    Args:
        device: ``"cpu"``, ``"cuda"`` for the current GPU, or a GPU with its index. Default: ``"cuda"`` if torch finds
            one, else ``"cpu"``.

    Returns:
        Name of the back-end -> ``""`` if it can run, else the reason why not and what to do.

    Raises:
        ValueError: the environment variable ``EARLYEXIT_SELF_TEST`` is neither ``0``, which switches the self-test off,
            nor ``1``.

    >>> import earlyexit_kernels as ee
    >>> ee.available_backends("cpu")["torch"]
    ''
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return {name: _unavailable_reason(name, torch.device(device)) for name in BACKENDS}


def working_device() -> torch.device:
    """Return the current GPU where torch finds one, else the CPU.

    Raises:
        BackendUnavailableError: torch finds a GPU, on which it cannot make a tensor.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    try:
        return torch.ones(1, device="cuda").device
    except Exception as error:  # of almost any class, by what is broken
        raise BackendUnavailableError(
            f"torch finds a GPU but cannot use it ({first_line(error)}); set CUDA_VISIBLE_DEVICES= to run on the CPU"
        ) from error


def first_line(error: Exception) -> str:
    """Return the class of an error and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


#: Choices made so far.
_CHOICES: dict[tuple[str, str | torch.device, tuple[str, ...]], str] = {}
#: What has been logged about them, once.
_LOGGED: set[str] = set()


@torch.compiler.assume_constant_result
def resolve(backend: str, device: str | torch.device, among: tuple[str, ...] = BACKENDS) -> str:
    """Choose the back-end for tensors on a device.

    Args:
        backend: ``"auto"`` or the name of a back-end.
        device: of the tensors, or its kind: ``"cpu"``, or ``"cuda"`` for the current GPU.
        among: the back-ends to choose from.

    Raises:
        ValueError: `backend` is neither ``"auto"`` nor in `among`, or ``EARLYEXIT_SELF_TEST`` neither ``0`` nor ``1``.
        BackendUnavailableError: the back-end cannot run here.
    """
    key = backend, device, among
    if key not in _CHOICES:
        _CHOICES[key] = _choose(backend, torch.device(device), among)
    return _CHOICES[key]


def _choose(backend: str, device: torch.device, among: tuple[str, ...]) -> str:
    if backend not in ("auto", *among):
        raise ValueError(f"backend: expected one of {('auto', *among)}, got {backend!r}")
    if backend != "auto":
        if reason := _unavailable_reason(backend, device):
            raise BackendUnavailableError(f"backend {backend!r} cannot run on {device.type} tensors: {reason}")
        return backend
    unavailable: list[str] = []
    for name in _PREFERENCE.get(device.type, ("torch",)):
        if name not in among:
            continue
        reason = _unavailable_reason(name, device)
        if not reason:
            _log_once(f"backend 'auto' chose {name!r} on {device}{''.join(unavailable)}", warn=bool(unavailable))
            return name
        unavailable.append(f"; not {name!r}: {reason}")
    raise AssertionError("torch runs everywhere")


def _log_once(message: str, *, warn: bool) -> None:
    if message not in _LOGGED:
        _LOGGED.add(message)
        logger.log(logging.WARNING if warn else logging.INFO, "%s", message)
