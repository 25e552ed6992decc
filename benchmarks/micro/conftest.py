"""The `timed` fixture: checks one variant of a case, then lets pytest-benchmark time it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks.harness import Implementation
from benchmarks.machine import device, l2_filler, synchronize

ROUNDS, WARM_UP = 20, 2


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    torch.set_flush_denormal(True)
    with torch.inference_mode():
        yield


@pytest.fixture
def timed(benchmark: Any) -> Callable[[Implementation], None]:
    """``timed(variant)``: check a variant, then time it; on a GPU its L2 cache is flushed before each call."""

    def run(variant: Implementation) -> None:
        wrong = variant.check().wrong
        assert not wrong, wrong

        def prepare() -> None:
            variant.prepare()
            if device() == "cuda":
                l2_filler("cuda").zero_()
            synchronize()

        def call() -> None:
            variant.call()
            synchronize()

        benchmark.group = benchmark.name.rpartition("-")[0]
        benchmark.pedantic(call, setup=prepare, rounds=ROUNDS, warmup_rounds=WARM_UP)

    return run
