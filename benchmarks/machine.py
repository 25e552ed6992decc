"""The machine that is measured. Imports nothing of the package, since `benchmarks.compare` runs older versions."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: Bytes written before a timing, over those of the L2 cache: the host launches the call while they are written.
FLUSHES = 16


MODEL_VARIABLE, DATA_VARIABLE = "EARLYEXIT_MODEL", "EARLYEXIT_DATA"


class NotMeasuredError(Exception):
    """Something cannot be timed on this machine; the message says why and goes into the record."""


def trained_folder() -> Path:
    """Return the folder of the trained model that is measured.

    Raises:
        NotMeasuredError: none is named.
    """
    folder = os.environ.get(MODEL_VARIABLE)
    if not folder:
        raise NotMeasuredError(f"name a folder that `earlyexit train` wrote with --model or {MODEL_VARIABLE}")
    return Path(folder)


def device() -> str:
    """Return the kind of device that everything runs on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronize() -> None:
    """Wait for the device."""
    if device() == "cuda":
        torch.cuda.synchronize()


@functools.cache
def l2_filler(device: str) -> Tensor:
    """Return a buffer much larger than a GPU's L2 cache; writing it flushes the cache and keeps the device busy."""
    size = torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(FLUSHES * size, dtype=torch.int8, device=device)


def runs_natively(dtype: str) -> bool:
    """Return whether this machine computes in a dtype instead of emulating it."""
    if dtype == "float32" or device() == "cuda":
        return True
    ops = torch.ops.mkldnn
    return bool(ops._is_mkldnn_bf16_supported() if dtype == "bfloat16" else ops._is_mkldnn_fp16_supported())


def first_line(error: BaseException) -> str:
    """Return an error's type and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def distance(got: Tensor, expected: Tensor) -> float:
    """Return the largest absolute difference; infinite if the shapes differ, NaN if either tensor has a NaN."""
    if got.shape != expected.shape:
        return float("inf")
    return float((got.float().to(expected.device) - expected.float()).abs().max())
