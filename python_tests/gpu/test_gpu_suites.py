"""Every suite of ``make gpu-check`` on the CPU, with replacements for CUDA: its records, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType

from benchmarks import goals
from benchmarks.end_to_end.models import CAPTURED_LAYERS
from benchmarks.gpu import calls, costs, exits
from benchmarks.gpu.suites import SUITES
from benchmarks.micro import decisions
from benchmarks.micro.plain import PlainDecision
from earlyexit_kernels.ops import self_test

FIELDS = {"suite", "case", "shape", "dtype", "engine", "backend", "baseline"}
NUMBERS = {"median_ms", "syncs", "launches", "captures"}


@pytest.fixture(autouse=True)
def gpu_calls(monkeypatch):
    """Report the CUDA calls of a batch, which the profiler cannot see on a CPU."""

    def as_on_a_gpu(run):
        run()
        return Counter({"cudaGraphLaunch": 1, "cudaStreamSynchronize": 1, "cudaGetDevice": 7})

    for module in (calls, costs, exits):
        monkeypatch.setattr(module, "calls_of", as_on_a_gpu)
    monkeypatch.setattr(exits, "LARGE_COPY", 2**12)
    monkeypatch.setattr(costs, "available_backends", lambda device: dict.fromkeys(("cpp", "triton"), ""))
    monkeypatch.setattr(self_test, "_failure", lambda backend, device: "")
    monkeypatch.delenv("EARLYEXIT_DATA", raising=False)


def records_of(name, gpu) -> list[dict]:
    return list(SUITES[f"gpu_{name}"](gpu))


@pytest.mark.parametrize("name", ["gpu_exit_step", pytest.param("all", marks=pytest.mark.thorough)])
def test_suites_run_and_all_goals_have_records(name, gpu):
    reached = set()
    for suite in SUITES if name == "all" else [name]:
        records = json.loads(json.dumps(list(SUITES[suite](gpu))))
        assert records and {record["suite"] for record in records} == {suite}
        for record in records:
            assert set(record) >= FIELDS and NUMBERS & set(record), record
            has_goal = "goal_name" in record
            assert record.get("goal_met") in (True, False) if has_goal else record.get("goal") is None
        reached |= {record["goal_name"] for record in records if "goal_name" in record}
    assert reached == set(goals.GPU) or name != "all"


def test_wrong_exit_is_refused(gpu, monkeypatch):
    step = decisions.raw("exit_step", "torch", "cpu")

    def wrong(*arguments):
        counts = step(*arguments)
        arguments[8].add_(0.5)
        return counts

    monkeypatch.setattr(decisions, "raw", lambda op, backend, device: wrong)
    records = records_of("exit_step", gpu)
    refused = [record for record in records if record["engine"] == exits.EXIT]
    assert refused == [record for record in records if "refused" in record]
    assert all("answers are off" in record["refused"] and "median_us" not in record for record in refused)


def test_wrong_chain_is_refused(gpu, monkeypatch):
    right = PlainDecision.__call__
    monkeypatch.setattr(exits.Exit, "chain_calls", lambda self, chain: [lambda: _off(right(self.plain))])
    gpu = dataclasses.replace(gpu, batches=(32,), dtypes=("float16",))
    records = list(exits.records(gpu))
    refused = [record for record in records if "refused" in record]
    assert {record["engine"] for record in refused} == {exits.CHAIN, exits.COMPILED}
    assert {record["baseline"] for record in records if "ratio" in record} == {exits.COPY}


def _off(answer):
    done, answers, exit_layer, live = answer
    return done, answers + 1, exit_layer, live


def test_layers_that_run_eagerly_are_not_timed_as_captured(gpu, replays):
    replays.error = RuntimeError("operation not permitted when stream is capturing")
    ours = [record for record in records_of("whole_float16_1", gpu) if record["engine"] == CAPTURED_LAYERS]
    assert ours and all("not permitted" in record["refused"] and "median_ms" not in record for record in ours)
    (levels,) = costs.level_records(gpu)
    assert "not permitted" in levels["refused"] and "captures" not in levels


def test_only_calls_in_the_range_are_counted():
    def event(name, start, end, kind=DeviceType.CPU):
        return SimpleNamespace(name=name, device_type=kind, time_range=SimpleNamespace(start=start, end=end))

    counted = calls.within(
        [
            event("cudaDeviceSynchronize", 0, 1),
            event(calls.RANGE, 2, 9),
            event("cudaLaunchKernel", 3, 4),
            event("aten::add", 3, 5),
            event("cudaStreamSynchronize", 6, 8),
            event("cudaEventSynchronize", 8, 9),
            event("cuda kernel", 3, 4, DeviceType.CUDA),
            event(calls.RANGE, 3, 4, DeviceType.CUDA),
            event("cudaDeviceSynchronize", 9, 10),
        ]
    )
    assert (calls.launches(counted), calls.synchronisations(counted), calls.event_waits(counted)) == (1, 1, 1)
