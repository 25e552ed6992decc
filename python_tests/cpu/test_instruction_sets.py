"""The tests of the vector kernels in processes of their own, with fewer instructions than the processor has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.models import python_environment

from earlyexit_kernels.cpu.panels import native_layouts

TESTS = Path(__file__).parents[1]
#: The tests of what has vector kernels.
FILES = ("cpu/test_embedding.py", "ops/test_first_tokens_linear.py", "ops/test_packed_layer.py")


@pytest.mark.thorough
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_the_tests_of_the_kernels_pass_with_fewer_instructions(capability):
    """With the kernels of AVX2 and with no vector kernels, which are what ATEN_CPU_CAPABILITY leaves.

    Without the tests of the reference in torch, which do not depend on it.
    """
    here = torch.backends.cpu.get_cpu_capability().lower()
    if here == capability or not native_layouts():
        pytest.skip("these kernels are the ones that the other tests run")
    options = ["-q", "-x", "-rs", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "not torch"]
    command = [sys.executable, "-m", "pytest", *options, *(str(TESTS / file) for file in FILES)]
    environment = python_environment(ATEN_CPU_CAPABILITY=capability)
    environment.pop("EARLYEXIT_TEST_SUMMARY", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:]
    assert ("has no vector kernels" in done.stdout) == (capability == "default"), done.stdout[-300:]
    if capability == "avx2":
        assert "no instructions for this type" not in done.stdout, done.stdout[-300:]
