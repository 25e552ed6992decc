"""How a microbenchmark is timed and refused; see `benchmarks.micro.measure` for how the ratio comes about."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks.micro import measure
from benchmarks.micro.measure import COMPILED, EAGER, Group, Rounds
from earlyexit_kernels.tuning.timing import paired_ratio, quantiles

LEFT_OUT = pytest.StashKey[list[dict[str, Any]]]()
BANDWIDTH = pytest.StashKey[measure.Bandwidth]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rounds", type=int, default=20, help="timed rounds of a microbenchmark, fewer where it is slow")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LEFT_OUT], config.stash[BANDWIDTH] = [], measure.Bandwidth()
    torch.set_flush_denormal(True)


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Beside what was timed: how near the roofline it comes, and what got no number, and why."""
    fastest = config.stash[BANDWIDTH].fastest
    for found in output_json["benchmarks"]:
        info = found["extra_info"]
        percent = measure.roofline_percent(info["moved_bytes"], info["quantiles_ms"][1] / 1000, fastest)
        info.update(copy_gb_per_s=round(fastest / 1e9, 3), roofline_percent=float(f"{percent:.4g}"))
    output_json["left_out"] = config.stash[LEFT_OUT]


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def timed(benchmark: Any, request: pytest.FixtureRequest) -> Callable[[Group, str], None]:
    """``timed(group, way)``: check one way of a group, then time it."""

    def run(group: Group, name: str) -> None:
        benchmark.group = str(group)
        benchmark.extra_info.update(_facts(group, name))
        key, reason = _why_not(group, name)
        if reason:
            request.config.stash[LEFT_OUT].append({**benchmark.extra_info, key: reason})
            pytest.skip(f"{key.replace('_', ' ')}: {reason}")
        request.config.stash[BANDWIDTH].look()
        rounds = Rounds(group.ways[name], group.ways[EAGER])
        count = rounds.rounds_within(measure.SECONDS, request.config.getoption("--rounds"))
        rounds.chain_seconds.clear()
        benchmark.pedantic(
            rounds.timed, setup=rounds.before, teardown=rounds.after, rounds=count, warmup_rounds=measure.WARM_UP
        )
        if benchmark.enabled:
            chain = rounds.chain_seconds[-count:]
            benchmark.extra_info.update(_numbers(group, benchmark.stats.stats.data, chain))

    return run


def _why_not(group: Group, name: str) -> tuple[str, str]:
    """Why a way gets no number, and the name of the field that says so; ``""`` where it gets one."""
    if group.chain_difference:
        return "refused", group.chain_difference
    try:
        return "refused", group.ways[name].difference()
    except Exception as error:
        if name != COMPILED:
            raise
        (first, *_) = str(error).strip().splitlines() or [""]
        return "not_measured", f"torch.compile fails here: {type(error).__name__}: {first}"


def _facts(group: Group, name: str) -> dict[str, Any]:
    return {
        "op": group.op,
        "case": group.case,
        "way": name,
        "shape": str(group.shape),
        "device": measure.DEVICE,
        "calls": group.calls,
        "moved_bytes": group.moved,
        **group.facts,
    }


def _numbers(group: Group, seconds: list[float], chain: list[float]) -> dict[str, Any]:
    """Of one call: milliseconds at the .2, .5 and .8 quantiles, and the ratio to the chain."""
    one = [x / group.calls for x in seconds]
    ratio = paired_ratio(seconds, chain)
    return {
        "quantiles_ms": [round(1000 * x, 6) for x in quantiles(one)],
        "p90_ms": round(1000 * quantiles(one, (0.9,))[0], 6),
        "chain_ms": round(1000 * quantiles(chain)[1] / group.calls, 6),
        "ratio": [round(x, 4) for x in (ratio.low, ratio.median, ratio.high)],
    }
