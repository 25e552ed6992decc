"""The `timed` fixture: checks one variant of a group, then lets pytest-benchmark time it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks.harness import Record, ratio_fields, record_header, time_fields
from benchmarks.machine import device, synchronize
from benchmarks.micro import groups
from benchmarks.micro.groups import Group

SUITE = "micro"
BASELINE = "plain torch chain"
SKIPPED = pytest.StashKey[list[Record]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rounds", type=int, default=20, help="timed rounds of a microbenchmark, fewer if it is slow")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SKIPPED] = []
    torch.set_flush_denormal(True)


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Add the records of the skipped variants."""
    output_json["skipped"] = config.stash[SKIPPED]


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def timed(benchmark: Any, request: pytest.FixtureRequest) -> Callable[[Group, str], None]:
    """``timed(group, name)``: check one variant of a group, then time it."""

    def run(group: Group, name: str) -> None:
        title, calls = f"{group.op} {group.case}", groups.CALLS[device()]
        header = record_header(SUITE, title, groups.variant_of(name), shape=str(group.shape), baseline=BASELINE)
        header |= {"op": group.op, "device": device(), "calls": calls, **group.facts}
        benchmark.group = str(group)
        benchmark.extra_info.update(header)
        case = group.prepared(name)
        if case.skipped:
            skipped = case.skipped[0]
            request.config.stash[SKIPPED].append(header | {skipped.kind: skipped.reason})
            pytest.skip(f"{skipped.kind.replace('_', ' ')}: {skipped.reason}")
        variant = group.variants[name]
        variant.prepare()
        rounds = groups.rounds_within(groups.SECONDS, variant.call, request.config.getoption("--rounds"))

        def prepare() -> None:
            variant.prepare()
            groups.flush()

        def call() -> None:
            variant.call()
            synchronize()

        benchmark.pedantic(call, setup=prepare, rounds=rounds, warmup_rounds=groups.WARM_UP)
        if benchmark.enabled:
            paired = case.times(rounds=rounds, warmup=1, sync=synchronize, prepare=groups.flush)
            fields = time_fields([1000 * seconds for seconds in benchmark.stats.stats.data], calls)
            fields |= ratio_fields(paired[variant.variant], paired[groups.CHAIN])
            benchmark.extra_info.update(fields | {"goal": None})

    return run
