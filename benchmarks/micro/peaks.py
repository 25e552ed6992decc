"""What the processor can do at most: float32 operations and bytes read per second, by a small C++ program."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.machine import NotMeasuredError

SOURCE = Path(__file__).with_suffix(".cpp")
OPTIONS = ("-O3", "-march=native", "-std=c++17", "-pthread")
#: CPU capability as torch names it -> options of the compiler for its vectors; ATEN_CPU_CAPABILITY limits it.
VECTORS = {"AVX512": ("-DVECTOR_BYTES=64",), "AVX2": ("-DVECTOR_BYTES=32", "-mno-avx512f")}


class Peaks(NamedTuple):
    """Float32 operations and bytes per second of all threads that torch uses."""

    operations: float
    bytes: float

    def best(self, other: Peaks) -> Peaks:
        """Return the larger of each: other machines on the same host can slow a measurement."""
        return Peaks(*map(max, self, other))


def measured_peaks() -> Peaks:
    """Measure the peaks of this machine, which takes a few seconds.

    Raises:
        NotMeasuredError: there is no C++ compiler.
    """
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        raise NotMeasuredError("the peaks of the processor are measured by a C++ program, and no compiler was found")
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in VECTORS:
        raise NotMeasuredError(f"the program that measures peaks needs AVX2 or AVX-512, torch uses {capability}")
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "peaks")
        subprocess.run(
            [compiler, *OPTIONS, *VECTORS[capability], str(SOURCE), "-o", program], check=True, capture_output=True
        )
        done = subprocess.run(
            [program, str(torch.get_num_threads())], check=True, capture_output=True, text=True, timeout=120
        )
    return Peaks(*map(float, done.stdout.split()))
