"""The tests of a file in a process of their own, with fewer instructions than the processor has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.models import python_environment

from earlyexit_kernels.cpu.panels import native_layouts

#: What ATEN_CPU_CAPABILITY leaves: the kernels of AVX2, and no vector kernels.
with_fewer_instructions = pytest.mark.parametrize("capability", ["avx2", "default"])


def run_tests_of(file: str, capability: str) -> str:
    """Run the other tests of a file with the kernels that ATEN_CPU_CAPABILITY leaves, and return what pytest prints.

    Those of the reference in torch do not depend on them.

    Skips where these kernels are the ones that the calling test has.
    """
    here = torch.backends.cpu.get_cpu_capability().lower()
    if here == capability or not native_layouts():
        pytest.skip("these kernels are the ones that the other tests run")
    options = ["-q", "-x", "-rs", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "not other_kernels and not torch"]
    command = [sys.executable, "-m", "pytest", *options, str(Path(file))]
    environment = python_environment(ATEN_CPU_CAPABILITY=capability)
    environment.pop("EARLYEXIT_TEST_SUMMARY", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout
