"""The GPU that is measured, and a fingerprint of the sources it is measured with."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
#: Fields queried from nvidia-smi.
SMI_FIELDS = (
    "driver_version pstate clocks.sm clocks.mem clocks.max.sm clocks.max.mem power.draw power.limit temperature.gpu"
).split()
#: Files that the numbers depend on.
SOURCES = ("earlyexit_kernels/**/*.py", "csrc/**/*", "benchmarks/**/*.py", "setup.py")


def facts() -> dict[str, Any]:
    """Return the GPU, its driver, and its current clocks."""
    properties = torch.cuda.get_device_properties(0)
    major, minor = torch.cuda.get_device_capability(0)
    return {
        "gpu": properties.name,
        "capability": f"{major}.{minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "nvidia_smi": smi(),
    }


def smi() -> dict[str, str]:
    """Return nvidia-smi's fields of the first GPU; empty if it is not installed or fails."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(SMI_FIELDS, values, strict=True)) if done.returncode == 0 and len(values) == len(SMI_FIELDS) else {}


def fingerprint(root: Path = ROOT) -> str:
    """Return a hash of the sources; a section finished with the same hash is not run again."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in SOURCES for path in root.glob(pattern) if path.is_file()}):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
