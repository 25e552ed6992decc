"""What the processor can do at most: float32 operations and bytes read per second, by a small C++ program."""

from __future__ import annotations

import functools
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


class Peaks(NamedTuple):
    """Float32 operations and bytes per second of all threads that torch uses."""

    operations: float
    bytes: float

    def seconds(self, operations: float, bytes_read: float) -> float:
        """Return the shortest time of some work: that of its operations, or of its bytes if that is longer."""
        return max(operations / self.operations, bytes_read / self.bytes)


@functools.cache
def machine_peaks() -> Peaks:
    """Measure the peaks of this machine, once in a process; it takes two seconds.

    Raises:
        NotMeasuredError: there is no C++ compiler.
    """
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        raise NotMeasuredError("the peaks of the processor are measured by a C++ program, and no compiler was found")
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "peaks")
        subprocess.run([compiler, *OPTIONS, str(SOURCE), "-o", program], check=True, capture_output=True)
        done = subprocess.run(
            [program, str(torch.get_num_threads())], check=True, capture_output=True, text=True, timeout=120
        )
    return Peaks(*map(float, done.stdout.split()))
