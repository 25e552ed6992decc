"""The `timed` fixture: checks one variant of a group, then lets pytest-benchmark time it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks import harness
from benchmarks.machine import synchronize
from benchmarks.micro.groups import WARM_UP, Group, flush

ROUNDS = 20


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    torch.set_flush_denormal(True)
    with torch.inference_mode():
        yield


@pytest.fixture
def timed(benchmark: Any) -> Callable[[Group, str], None]:
    """``timed(group, name)``: check one variant of a group, and time it; a wrong one fails, a missing one is skipped"""

    def run(group: Group, name: str) -> None:
        variant = group.variants[name]
        for skipped in harness.prepare([(variant.variant, lambda: variant)]).skipped:
            stop = pytest.fail if skipped.kind == harness.REFUSED else pytest.skip
            stop(skipped.reason)

        def prepare() -> None:
            variant.prepare()
            flush()

        def call() -> None:
            variant.call()
            synchronize()

        benchmark.group = str(group)
        benchmark.pedantic(call, setup=prepare, rounds=ROUNDS, warmup_rounds=WARM_UP)

    return run
