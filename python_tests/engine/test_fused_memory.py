"""What fused layers keep in oneDNN's cache: one product for each weight and token count, however many batches run."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from support.models import python_environment

from earlyexit_kernels.engine.fused_layers import why_not_onednn

COUNTS = range(2, 14)
PRODUCTS = 4
#: Products that `why_not_onednn` tries.
TRIED = 2
#: Runs one row of each length, three times over; oneDNN prints a line for each product that it creates.
PROGRAM = f"""
import torch
from support.models import early_exit
model = early_exit()
model.set_layers("fused")
with torch.inference_mode():
    for number in range(3):
        for length in range({COUNTS.start}, {COUNTS.stop}):
            model(input_ids=torch.randint(5, 100, (1, length)))
        print("round", flush=True)
"""


def created(**variables: str) -> list[int]:
    """Products that each of the three rounds creates."""
    environment = python_environment(ONEDNN_VERBOSE="profile_create", **variables)
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    rounds = done.stdout.split("round\n")
    if "create:cache_" not in done.stdout:
        pytest.skip("this build of oneDNN doesn't report what it creates")
    return [
        sum("create:cache_miss" in line and ",inner_product," in line for line in lines.splitlines())
        for lines in rounds[:3]
    ]


@pytest.mark.skipif(bool(why_not_onednn(torch.float32)), reason="oneDNN's packed products can't be had here")
def test_products_are_kept_by_token_count_and_capacity_limits_them():
    first, *later = created()
    assert 0 < first <= PRODUCTS * len(COUNTS) + TRIED and later == [0, 0]
    limited = created(ONEDNN_PRIMITIVE_CACHE_CAPACITY="8")
    assert all(round_created > first / 2 for round_created in limited)
