"""Every section of ``make gpu-check`` on the CPU, with replacements for CUDA: its records, and what it refuses."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from support.fake_gpu import Event, small_bench
from support.models import batch_for, early_exit
from torch.autograd import DeviceType

from benchmarks import goals, machine
from benchmarks.end_to_end import baselines, engines, models
from benchmarks.end_to_end.engines import GRAPH
from benchmarks.gpu import bench, calls, exits, nodes, products, promises, tiles, whole
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.sections import SECTIONS
from benchmarks.machine import DTYPES, NotMeasuredError
from earlyexit_kernels import ops
from earlyexit_kernels.backends import TRITON_INTERPRETED, available_backends
from earlyexit_kernels.engine import capturing, choice, graphs
from earlyexit_kernels.engine.inputs import Inputs

FIELDS = {"suite", "case", "shape", "dtype", "engine", "backend", "baseline"}
NUMBERS = {"median_ms", "syncs", "different", "launches", "entry", "fastest", "microseconds"}
PROFILED = calls.calls_of
LAUNCHED = dict(tiles.LAUNCHES)
#: Goals that the sections have had records for in this process, by section.
REACHED: dict[str, set[str]] = {}


@pytest.fixture(autouse=True)
def gpu_calls(monkeypatch):
    """Report the CUDA calls of a batch, which the profiler cannot see on a CPU."""

    def as_on_a_gpu(run):
        run()
        return Counter({"cudaGraphLaunch": 1, "cudaEventSynchronize": 1, "cudaGetDevice": 7})

    for module in (calls, promises, exits):
        monkeypatch.setattr(module, "calls_of", as_on_a_gpu)
    monkeypatch.setattr(exits, "LARGE_COPY", 2**12)
    monkeypatch.setattr(promises, "ROWS", 12)
    for way in tiles.LAUNCHES:
        monkeypatch.setitem(tiles.LAUNCHES, way, in_torch)
    monkeypatch.setattr(tiles, "shared_memory", lambda device: 227 * 1024)
    monkeypatch.delenv("EARLYEXIT_DATA", raising=False)


def in_torch(x, weight, bias, offsets, out, in_parts, size) -> None:
    ops.rows_linear(x, weight, bias, offsets, out, in_parts=in_parts, backend="torch")


def records_of(name, gpu) -> list[dict]:
    return list(SECTIONS[name].records(gpu))


def with_changes(gpu, **changes) -> Bench:
    return dataclasses.replace(gpu, **changes)


@pytest.mark.sample(7)
@pytest.mark.parametrize("name", SECTIONS)
def test_section_runs_and_records(name, gpu):
    records = json.loads(json.dumps(records_of(name, gpu)))
    assert records and {record["suite"] for record in records} == {f"gpu_{name}"}
    for record in records:
        assert set(record) >= FIELDS and NUMBERS & set(record), record
        has_goal = "goal_name" in record
        assert record.get("goal_met") in (True, False) if has_goal else record.get("goal") is None
    REACHED[name] = {record["goal_name"] for record in records if "goal_name" in record}


def test_every_goal_has_a_record():
    if set(REACHED) != set(SECTIONS):
        pytest.skip("known only after all sections have run in this process")
    assert set().union(*REACHED.values()) == set(goals.GPU) - {"errors that compute-sanitizer finds"}


def test_goal_fields():
    met = goals.gpu_goal("host synchronisations a batch", {"syncs": 1})
    assert met == {"goal_name": "host synchronisations a batch", "goal": 1, "goal_of": "syncs", "goal_met": True}
    assert not goals.gpu_goal("never exit over torch.compile, B 32", {"ratio": 1.06})["goal_met"]
    assert goals.gpu_goal("unknown", {"ratio": 0.0}) == {}


def test_wrong_exit_is_refused(gpu, monkeypatch):
    torch_exit = exits.bare_op("resident_exit", "torch", "cpu")

    def wrong(*arguments):
        torch_exit(*arguments)
        arguments[11].add_(0.5)

    monkeypatch.setattr(exits, "bare_op", lambda op, backend, device: {"torch": torch_exit, "wrong": wrong}[backend])
    for name in ("exit_step", "mean_pooling"):
        records = records_of(name, with_changes(gpu, exits="wrong"))
        refused = [record for record in records if record["engine"] == exits.EXIT]
        assert refused == [record for record in records if "refused" in record]
        assert all("answers are 0.5 off" in record["refused"] and "median_us" not in record for record in refused)


def test_wrong_chain_is_refused(gpu, monkeypatch):
    chains = iter([lambda *x: (x[0], x[1] + 1, torch.ones_like(x[2]), 0), None])
    right = exits.Exit.chain
    monkeypatch.setattr(exits.Exit, "chain", lambda self: next(chains, None) or right(self))
    records = list(exits.step_records(with_changes(gpu, batches=(32,), dtypes=("float16",))))
    (refused,) = [record for record in records if "refused" in record]
    assert refused["engine"] == exits.CHAIN
    assert {record["baseline"] for record in records if "ratio" in record} == {exits.COMPILED}


def test_nodes_that_do_not_skip_are_refused(gpu, monkeypatch):
    def ignoring(self, record, warm_up=None):
        ignored = SimpleNamespace(handle=lambda: None, when=lambda handle, counts, body: body())
        return lambda: record(ignored)

    monkeypatch.setattr(Bench, "conditional_graph", ignoring)
    (record,) = nodes.node_records(gpu)
    assert record["refused"] == "3 bodies of 3 ran, expected 0"


def test_wrong_product_is_refused(gpu, monkeypatch):
    monkeypatch.setitem(products.WAYS, products.OURS, lambda bench, x, weight, bias, offsets, out: out * 0)
    refused = [record for record in products.records(gpu) if record["engine"] == products.OURS]
    assert refused and all("off" in record["refused"] and "median_us" not in record for record in refused)


def test_wrong_tile_is_refused_and_never_the_fastest(gpu, monkeypatch):
    monkeypatch.setattr(tiles, "has_bulk_copies", lambda device: True)
    monkeypatch.setattr(tiles, "few_tiles", lambda *_: False)
    monkeypatch.setitem(tiles.LAUNCHES, "pointers", lambda x, weight, bias, offsets, out, in_parts, size: out.zero_())
    found = records_of("tiles", gpu)
    refused = [record for record in found if "refused" in record]
    assert all("off" in record["refused"] and "pointers" in record["engine"] for record in refused)
    assert len(refused) == len(products.PRODUCTS) * len(tiles.BY_POINTERS)
    best = [record for record in found if "fastest" in record]
    assert [record["case"] for record in best] == [*products.PRODUCTS]
    for record in best:
        assert record["backend"] == "bulk copies" and record["fastest"].startswith("Tiles(rows=128, columns=")
    assert all("192" in record["fastest"] for record in best if record["case"] in tiles.IN_PARTS)


@pytest.mark.triton
@pytest.mark.skipif(not TRITON_INTERPRETED, reason="runs in Triton's interpreter, as TRITON_INTERPRET=1")
@pytest.mark.parametrize("in_parts", [False, True])
def test_tiles_are_launched(in_parts, monkeypatch):
    """Whole numbers, whose sums are exact."""
    monkeypatch.setattr(tiles, "has_bulk_copies", lambda device: True)
    monkeypatch.setattr(tiles, "few_tiles", lambda *_: False)
    x, weight = (torch.randint(-3, 4, shape).half() for shape in ((70, 136), (264, 136)))
    bias, offsets = weight[:, 0].contiguous(), torch.tensor([0, 69], dtype=torch.int32)
    want = x.float() @ weight.float().T + bias.float()
    found = tiles.entries(x, 264, in_parts)
    for way, size in found.values():
        out = torch.full((70, 264), torch.nan, dtype=torch.float16)
        LAUNCHED[way](x, weight, bias, offsets, out, in_parts, size)
        assert torch.equal(out[:69], want[:69].half()) and out[69].isnan().all()
    assert {way for way, _ in found.values()} == {*LAUNCHED}


def test_tiles_that_fit_are_swept(gpu, monkeypatch):
    x = torch.zeros(4096, 768, dtype=torch.float16)
    monkeypatch.setattr(tiles, "has_bulk_copies", lambda device: True)
    assert len(tiles.entries(x, 768, False)) == len(tiles.BY_POINTERS) + 2
    assert sum(way == "bulk copies" for way, _ in tiles.entries(x, 768, True).values()) == 1
    assert all(way == "pointers" for way, _ in tiles.entries(x[:128], 768, True).values()), "parts side by side"
    monkeypatch.setattr(tiles, "has_bulk_copies", lambda device: False)
    monkeypatch.setattr(tiles, "shared_memory", lambda device: 99 * 1024)
    small = [size for _, size in tiles.entries(x, 768, False).values()]
    assert small and all(size.shared_bytes(2) < 99 * 1024 for size in small)
    assert {size.depth for size in (*tiles.BY_POINTERS, *small)} == {64}, "the depth decides bits"


def test_compiled_model_without_graphs_is_not_measured(gpu, monkeypatch):
    skips = iter((0, 1))
    monkeypatch.setattr(baselines, "device", lambda: "cuda")
    monkeypatch.setattr(baselines, "_skipped_graphs", lambda: next(skips))
    records = records_of("whole_float16_32", gpu)
    (skipped,) = [record for record in records if "not_measured" in record]
    assert skipped["engine"] == baselines.COMPILED_WHOLE and "without CUDA graphs" in skipped["not_measured"]
    assert not any(record["baseline"] == baselines.COMPILED_WHOLE for record in records)


def test_weights_are_never_inference_tensors(gpu):
    with torch.inference_mode():
        found = [models.subject("BERT-base", dtype) for dtype in ("float16", "float32")]
    for subject in found:
        assert not any(x.is_inference() for part in (subject.plain, subject.model) for x in part.parameters())


def test_graph_that_falls_back_is_not_timed(gpu, monkeypatch):
    def fails(*_):
        raise graphs.CaptureError("capturing failed: out of memory")

    monkeypatch.setattr(graphs.Graphs, "run", fails)
    ours = [record for record in records_of("whole_float16_1", gpu) if record["engine"] == GRAPH]
    assert ours and all("out of memory" in record["refused"] and "median_ms" not in record for record in ours)
    with pytest.raises(graphs.CaptureError):
        records_of("bits", gpu)


def test_differing_bits_are_counted(gpu, monkeypatch):
    answer = graphs.Graphs.run

    def drifting(self, *arguments):
        """Rows alone in their batch get other logits."""
        out = answer(self, *arguments)
        return dataclasses.replace(out, logits=out.logits + (1.0 if len(out.logits) == 1 else 0.0))

    monkeypatch.setattr(graphs.Graphs, "run", drifting)
    record = next(promises.bit_records(with_changes(gpu, batches=(4,))))
    assert (record["rows"], record["different"], record["goal_met"]) == (8, 8, False)


def test_graph_engine_without_fall_back(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    model = early_exit(pooling="first")
    model.set_engine = lambda name: setattr(model.execution, "_engine", name)
    engines.ENGINES[GRAPH](model)
    with pytest.raises(NotMeasuredError, match=r"^engine 'graph' fell back to 'eager': graphs require CUDA$"):
        model.execution.run_graph(model.view(), Inputs(batch_for(model)["input_ids"]))


def test_profiler_that_sees_nothing_is_not_trusted(gpu, monkeypatch):
    monkeypatch.setattr(calls, "calls_of", lambda run: Counter())
    (record,) = promises.sync_records(gpu)
    assert "does not show the launch" in record["not_measured"]
    records = [record for record in exits.step_records(gpu) if record["case"] == "launches"]
    assert records and all("not_measured" in record and "goal_name" not in record for record in records)


def test_synchronisations_are_recorded_with_and_without_a_mask(gpu):
    records = [record for record in promises.sync_records(gpu) if "goal_name" in record]
    assert [record["shape"] for record in records] == ["B 32, S 8, with a mask", "B 32, S 8, without a mask"]


def test_debug_mode_message(gpu):
    def synchronises():
        raise RuntimeError("called a synchronizing CUDA operation\nat")

    assert promises._in_debug_mode(synchronises) == "called a synchronizing CUDA operation"
    assert promises._in_debug_mode(lambda: None) == ""


def test_only_calls_in_the_range_are_counted(monkeypatch):
    def event(name, start, end, kind=DeviceType.CPU):
        return SimpleNamespace(name=name, device_type=kind, time_range=SimpleNamespace(start=start, end=end))

    found = calls.within(
        [
            event("cudaDeviceSynchronize", 0, 1),
            event(calls.RANGE, 2, 9),
            event("cudaLaunchKernel", 3, 4),
            event("aten::add", 3, 5),
            event("cudaStreamSynchronize", 6, 8),
            event("cuda kernel", 3, 4, DeviceType.CUDA),
            event(calls.RANGE, 3, 4, DeviceType.CUDA),
            event("cudaDeviceSynchronize", 9, 10),
        ]
    )
    assert found == Counter({"cudaLaunchKernel": 1, "cudaStreamSynchronize": 1})
    assert (calls.launches(found), calls.synchronisations(found)) == (1, 1)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert PROFILED(lambda: torch.ones(3).sum().item()) == Counter()


def test_entry_of_the_fastest_engine(monkeypatch):
    entry = whole.fastest_entry({32: 0.7, 128: 0.8, 512: 1.2, 4096: 1.1, 65536: 0.9})
    assert entry == [(128, "graph"), (4096, "eager"), (65536, "graph")]
    monkeypatch.setattr(choice, "FASTEST", {"H200": tuple(entry)})
    engines = [choice.fastest("NVIDIA H200", 1, tokens).name for tokens in (128, 129, 4096, 4097, 10**6)]
    assert engines == ["graph", "eager", "eager", "graph", "graph"]


def test_natural_lengths_need_text(monkeypatch):
    assert whole._ragged(32).name == "B 32, S 4 to 35"
    monkeypatch.setenv("EARLYEXIT_DATA", "somewhere")
    assert whole._ragged(32).name == "B 32, SST-2 lengths"


@pytest.fixture
def cuda(monkeypatch):
    """Replace what captures use of `torch.cuda`; return the list of captured calls."""
    captured = []

    @contextlib.contextmanager
    def graph(into, stream, capture_error_mode):
        captured.append("begin")
        yield
        captured.append("end")

    stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
    for name, stand_in in {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: captured.append("replay")),
        "graph": graph,
        "graph_pool_handle": lambda: (0, 1),
        "current_device": lambda: 0,
        "synchronize": lambda: None,
        "Event": Event,
        "get_device_properties": lambda *_: SimpleNamespace(L2_cache_size=64),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    machine.l2_filler.cache_clear()
    return captured


def test_calls_are_captured_after_a_warm_up(cuda):
    small_bench().graph_of([lambda: cuda.append("call")] * 2)()
    assert cuda == ["call", "call", "begin", "call", "call", "end", "replay"]


@pytest.mark.parametrize(("backend", "kind"), [("cpp", "ConditionalNodes"), ("triton", "TorchNodes")])
def test_nodes_are_captured_after_a_warm_up(cuda_captures, backend, kind):
    made, own = [], with_changes(small_bench(), exits=backend)
    launches = (lambda nodes: made.append(type(nodes).__name__), lambda: cuda_captures.said.append("warm up"))
    own.conditional_graph(*launches)()
    assert cuda_captures.said == ["warm up", "begin", "end", "replay"] and made == [kind]


def test_missing_nodes_are_not_measured(monkeypatch):
    monkeypatch.setattr(capturing, "TORCH_CALLS", ("no_such_call",))
    for measure in (lambda own: own.conditional_graph(print), lambda own: next(whole.conditional_records(own))):
        with pytest.raises(NotMeasuredError, match=r"no graphs with IF nodes: torch .* has no CUDAGraph"):
            measure(small_bench())


def test_times_by_events_and_by_the_host(cuda):
    restored = []
    ways = {"a": lambda: None, "b": lambda: None}
    for by_host in (False, True):
        times = small_bench().times(ways, restore=lambda: restored.append(1), by_host=by_host)
        assert {name: len(found) for name, found in times.items()} == {"a": 2, "b": 2}
    assert len(restored) == 8
    numbers = bench.micros([1.0, 2.0, 3.0], calls=10)
    assert (numbers["median_us"], numbers["median_ms"], numbers["rounds"]) == (200.0, 0.2, 3)
    assert bench.over([1.0], [2.0], "b") == {"baseline": "b", "ratio": 0.5, "ratio_low": 0.5, "ratio_high": 0.5}


def test_bench_needs_a_gpu_and_triton(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NotMeasuredError, match="no CUDA device"):
        Bench.here()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    reasons = dict.fromkeys(available_backends("cpu"), "")
    for missing, exits_by in (({}, "cpp"), ({"cpp": "is not built"}, "triton")):
        monkeypatch.setattr(bench, "available_backends", lambda device, missing=missing: reasons | missing)
        assert (Bench.here().encoder, Bench.here().exits) == ("triton", exits_by)
    monkeypatch.setattr(bench, "available_backends", lambda device: reasons | {"triton": "no triton"})
    with pytest.raises(NotMeasuredError, match="no triton"):
        Bench.here()


def test_every_dtype_has_a_tolerance():
    assert set(Bench.__dataclass_fields__["dtypes"].default) <= set(DTYPES) <= {*products.TOLERANCE}
