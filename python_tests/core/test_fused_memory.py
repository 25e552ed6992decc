"""Products that fused layers keep in oneDNN's cache: one for each weight and token count."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest
import torch
from support.models import python_environment

from earlyexit_kernels.cpu.onednn import onednn_unsupported_reason

COUNTS = range(2, 8)
PRODUCTS = 4
#: Number of products that `onednn_unsupported_reason` computes.
TRIED = 2
FAMILIES, ROUNDS = ("bert", "modernbert"), 3
#: Runs one row of each length, three times for each family; oneDNN prints a line for each product that it creates.
PROGRAM = f"""
import torch
from support.models import early_exit
for family in {FAMILIES}:
    model = early_exit(family)
    model.configure(path="fused")
    with torch.inference_mode():
        for number in range({ROUNDS}):
            for length in range({COUNTS.start}, {COUNTS.stop}):
                model(input_ids=torch.randint(5, 100, (1, length)))
            print("round", flush=True)
"""


@functools.cache
def created(**variables: str) -> dict[str, list[int]]:
    """Return the number of products created in each of the three rounds, by family; one process runs all."""
    # without the vector kernels of the package, which would replace oneDNN's products
    environment = python_environment(ONEDNN_VERBOSE="profile_create", ATEN_CPU_CAPABILITY="default", **variables)
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    rounds = done.stdout.split("round\n")
    if "create:cache_" not in done.stdout:
        pytest.skip("this build of oneDNN does not report created products")
    counts = [
        sum("create:cache_miss" in line and ",inner_product," in line for line in lines.splitlines())
        for lines in rounds[:-1]
    ]
    return {family: counts[k * ROUNDS : (k + 1) * ROUNDS] for k, family in enumerate(FAMILIES)}


@pytest.mark.thorough
@pytest.mark.skipif(bool(onednn_unsupported_reason(torch.float32)), reason="oneDNN's packed products are not available")
@pytest.mark.parametrize("family", FAMILIES)
def test_products_are_cached_by_token_count_up_to_the_capacity(family):
    first, *later = created()[family]
    assert 0 < first <= PRODUCTS * len(COUNTS) + TRIED and later == [0, 0]
    limited = created(ONEDNN_PRIMITIVE_CACHE_CAPACITY="8")[family]
    assert all(round_created > first / 2 for round_created in limited)
