"""Every suite of ``make gpu-check`` on the CPU, with replacements for CUDA: its records, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from support.fake_gpu import small_bench
from torch.autograd import DeviceType

from benchmarks import goals
from benchmarks.end_to_end import baselines, models
from benchmarks.end_to_end.engines import CAPTURED_LAYERS
from benchmarks.gpu import bench, calls, costs, exits, whole
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.suites import SUITES
from benchmarks.machine import NotMeasuredError
from benchmarks.micro import decisions
from benchmarks.micro.plain import PlainDecision
from earlyexit_kernels.backends import available_backends
from earlyexit_kernels.ops import self_test

FIELDS = {"suite", "case", "shape", "dtype", "engine", "backend", "baseline"}
NUMBERS = {"median_ms", "syncs", "launches", "captures"}
PROFILED = calls.calls_of
#: Goals that the suites have had records for in this process, by suite.
REACHED: dict[str, set[str]] = {}


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


@pytest.mark.sample(5)
@pytest.mark.parametrize("name", SUITES)
def test_suite_runs_and_records(name, gpu):
    records = json.loads(json.dumps(list(SUITES[name](gpu))))
    assert records and {record["suite"] for record in records} == {name}
    for record in records:
        assert set(record) >= FIELDS and NUMBERS & set(record), record
        has_goal = "goal_name" in record
        assert record.get("goal_met") in (True, False) if has_goal else record.get("goal") is None
    REACHED[name] = {record["goal_name"] for record in records if "goal_name" in record}


def test_every_goal_has_a_record():
    if set(REACHED) != set(SUITES):
        pytest.skip("known only after all suites have run in this process")
    assert set().union(*REACHED.values()) == set(goals.GPU)


def test_goal_fields():
    met = goals.gpu_goal("host synchronisations a batch", {"syncs": 1})
    assert met == {"goal_name": "host synchronisations a batch", "goal": 1, "goal_of": "syncs", "goal_met": True}
    assert not goals.gpu_goal("never exit over torch.compile, B 32", {"ratio": 1.06})["goal_met"]
    assert goals.gpu_goal("unknown", {"ratio": 0.0}) == {}


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


def test_compiled_model_without_graphs_is_not_measured(gpu, monkeypatch):
    skips = iter((0, 1))
    monkeypatch.setattr(baselines, "device", lambda: "cuda")
    monkeypatch.setattr(baselines, "_skipped_graphs", lambda: next(skips))
    records = records_of("whole_float16_32", gpu)
    (skipped,) = [record for record in records if "not_measured" in record]
    assert skipped["engine"] == baselines.COMPILED_WHOLE and "without CUDA graphs" in skipped["not_measured"]
    assert not any(record["baseline"] == baselines.COMPILED_WHOLE for record in records)


def test_layers_that_run_eagerly_are_not_timed_as_captured(gpu, replays):
    replays.error = RuntimeError("operation not permitted when stream is capturing")
    ours = [record for record in records_of("whole_float16_1", gpu) if record["engine"] == CAPTURED_LAYERS]
    assert ours and all("not permitted" in record["refused"] and "median_ms" not in record for record in ours)
    (levels,) = costs.level_records(gpu)
    assert "not permitted" in levels["refused"] and "captures" not in levels


def test_levels_are_counted(gpu, replays):
    (record,) = costs.level_records(gpu)
    assert record["captures"] == replays.captures > 0 and 0 < record["levels"] < gpu.mixed and record["seconds"] > 0


def test_failed_self_test_is_refused_and_times_are_apart(gpu, monkeypatch):
    first, _ = costs.self_test_records(gpu)
    assert first["goal_name"] == "self-test of cpp, milliseconds" and first["goal_met"] and first["first_ms"] >= 0
    monkeypatch.setattr(self_test, "_failure", lambda backend, device: "compact: no C compiler" * (backend == "triton"))
    _, refused = costs.self_test_records(gpu)
    assert refused["refused"] == "compact: no C compiler" and "median_ms" not in refused
    monkeypatch.setattr(costs, "available_backends", lambda device: {"cpp": "is not built", "triton": ""})
    assert next(costs.self_test_records(gpu))["not_measured"] == "is not built"


def test_weights_are_never_inference_tensors(gpu):
    with torch.inference_mode():
        subjects = [models.subject("BERT-base", dtype) for dtype in ("float16", "float32")]
    for subject in subjects:
        assert not any(x.is_inference() for part in (subject.plain, subject.model) for x in part.parameters())


def test_profiler_that_sees_nothing_is_not_trusted(gpu, monkeypatch):
    monkeypatch.setattr(calls, "calls_of", lambda run: Counter())
    (record,) = costs.sync_records(gpu)
    assert "does not show the launch" in record["not_measured"]
    records = [record for record in exits.records(gpu) if record["case"] == "launches"]
    assert records and all("not_measured" in record and "goal_name" not in record for record in records)


def test_synchronisations_are_recorded_with_and_without_a_mask(gpu, monkeypatch):
    records = [record for record in costs.sync_records(gpu) if "goal_name" in record]
    assert [record["shape"] for record in records] == ["B 32, S 8, with a mask", "B 32, S 8, without a mask"]

    def synchronises():
        raise RuntimeError("called a synchronizing CUDA operation\nat")

    assert costs.in_debug_mode(synchronises) == "called a synchronizing CUDA operation"
    assert costs.in_debug_mode(lambda: None) == ""


def test_only_calls_in_the_range_are_counted(monkeypatch):
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
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert PROFILED(lambda: torch.ones(3).sum().item()) == Counter()


def test_natural_lengths_need_text(monkeypatch):
    assert whole.ragged_rows(32).name == "B 32, S 4 to 35"
    monkeypatch.setenv("EARLYEXIT_DATA", "somewhere")
    assert whole.ragged_rows(32).name == "B 32, SST-2 lengths"


def test_times_by_events_and_by_the_host(gpu):
    restored = []
    ways = {"a": lambda: None, "b": lambda: None}
    for by_host in (False, True):
        times = small_bench().times(ways, restore=lambda: restored.append(1), by_host=by_host)
        assert {name: len(rounds) for name, rounds in times.items()} == {"a": 2, "b": 2}
    assert len(restored) == 2 * 2 * (gpu.rounds + gpu.warmup)
    numbers = bench.micros([1.0, 2.0, 3.0], calls=10)
    assert (numbers["median_us"], numbers["median_ms"], numbers["rounds"]) == (200.0, 0.2, 3)
    assert bench.over([1.0], [2.0], "b") == {"baseline": "b", "ratio": 0.5, "ratio_low": 0.5, "ratio_high": 0.5}


def test_bench_needs_a_gpu_and_a_backend(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NotMeasuredError, match="no CUDA device"):
        Bench.here()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    reasons = dict.fromkeys(available_backends("cpu"), "")
    for missing, backend in (({}, "cpp"), ({"cpp": "is not built"}, "triton")):
        monkeypatch.setattr(bench, "available_backends", lambda device, missing=missing: reasons | missing)
        assert Bench.here().backend == backend
    monkeypatch.setattr(bench, "available_backends", lambda device: {"cpp": "is not built", "triton": "no triton"})
    with pytest.raises(NotMeasuredError, match="no triton"):
        Bench.here()
