"""Replacements for `torch.cuda`, with which GPU code runs on the CPU.

Streams and events have no effect, a graph is a plain call, and the body of a conditional node writes nothing unless its
handle was set.
"""

from __future__ import annotations

import contextlib
import time
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig

from benchmarks import machine
from benchmarks.end_to_end import answers, baselines, engines, measure, models
from benchmarks.end_to_end.workloads import Fixed
from benchmarks.gpu import kernels, nodes
from benchmarks.gpu.bench import Bench
from earlyexit_kernels.engine import capturing
from earlyexit_kernels.engine.choice import Choice
from earlyexit_kernels.ops import bare_op

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


class Event:
    """An event that records the time of the host."""

    def __init__(self, **_: Any) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        return 1000 * (end.at - self.at)


class NoWrites(TorchDispatchMode):
    """In-place operations write nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return args[0]


class Nodes:
    """IF nodes whose handles are set by `_opening`."""

    def __init__(self) -> None:
        self.opened: set[int] = set()
        self.made = 0

    def handle(self) -> int:
        self.made += 1
        return self.made

    def when(self, handle: int, counts: torch.Tensor, body: Any) -> None:
        with contextlib.nullcontext() if handle in self.opened else NoWrites():
            body()


def small_bench() -> Bench:
    """Return a `Bench` with the usual numbers of rows and the smallest other sizes."""
    return Bench(
        "cpu", "torch", "torch", length=8, width=24, copies=2, nodes=3, products=(8,), tiled=(8,),
        shapes=((1, 4), (3, 8)), rounds=2, warmup=0,
    )  # fmt: skip


def use_tiny_models(monkeypatch) -> None:
    """Replace the models of the benchmarks by tiny ones of the same names, and remove pauses between measurements."""
    config = BertConfig(num_labels=models.CLASSES, vocab_size=100, **SIZES)
    subjects = {name: partial(models.random_subject, name, config) for name in models.SUBJECTS}
    monkeypatch.setattr(models, "SUBJECTS", subjects)
    monkeypatch.setattr(measure, "REST", 0)
    monkeypatch.setitem(answers.PROBES, "cpu", Fixed(4, 8))
    clear_caches()


def clear_caches() -> None:
    """Drop all models that the benchmarks keep."""
    for cache in (models.subject, engines.engine_model, answers.rounding_of, machine.l2_filler):
        cache.cache_clear()


@pytest.fixture
def gpu(monkeypatch, captures) -> Bench:
    """Replace everything that the benchmarks use of CUDA, and return a small bench."""
    stream = SimpleNamespace(
        wait_stream=lambda other: None,
        synchronize=lambda: None,
        record_event=lambda: SimpleNamespace(synchronize=lambda: None),
    )
    card = SimpleNamespace(name="Fake GPU", L2_cache_size=64, multi_processor_count=2, total_memory=2**30)
    for name, stand_in in {
        "Stream": lambda *_: stream,
        "current_stream": lambda *_: stream,
        "synchronize": lambda: None,
        "Event": Event,
        "get_device_properties": lambda *_: card,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: card.name,
        "set_sync_debug_mode": lambda mode: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(baselines, "captured_call", lambda run: (lambda: None, run()))
    monkeypatch.setattr(Bench, "graph_of", lambda self, calls: lambda: [call() for call in calls])
    monkeypatch.setattr(Bench, "conditional_graph", _conditional_graph)
    monkeypatch.setattr(nodes, "bare_op", lambda *_: _opening)
    monkeypatch.setattr(capturing, "TORCH_CALLS", ())
    monkeypatch.setattr(kernels, "kernels_of", _kernels)
    monkeypatch.setattr(capturing, "record", lambda nodes, launch, stream: launch)
    monkeypatch.setitem(engines.ENGINES, engines.GRAPH, _graph_on_cpu)
    monkeypatch.setattr(models, "runs_natively", lambda dtype: True)
    use_tiny_models(monkeypatch)
    yield small_bench()
    clear_caches()


def _graph_on_cpu(model: Any) -> None:
    execution = model.execution

    def run(view: Any, inputs: Any, *, strict: bool) -> Any:
        return execution.graphs.run(view, execution.backend(view), inputs)

    execution.run = run


def falls_back_on_cpu(model: Any) -> None:
    """Choose the graph engine as `set_engine("graph")` does: batches that cannot be captured run eagerly."""
    execution = model.execution
    eager, execution._engine = execution.run, "graph"
    execution.choose_engine = lambda *_, **__: Choice("graph", "it was requested")

    def run(view: Any, inputs: Any, *, strict: bool) -> Any:
        out = execution.run_graph(view, inputs)
        return eager(view, inputs, strict=strict) if out is None else out

    execution.run = run


_OPEN: list[Nodes] = []


def _conditional_graph(self: Bench, record: Any, warm_up: Any = lambda: None) -> Any:
    warm_up()

    def replay() -> None:
        _OPEN.append(Nodes())
        record(_OPEN[-1])
        _OPEN.clear()

    return replay


def _kernels(run: Any) -> list[kernels.Kernel]:
    run()
    return [kernels.Kernel("exit_kernel", 2, 9.0), kernels.Kernel("void gemm<" + 200 * "x", 24, 31.5)]


def _opening(*arguments: Any) -> None:
    *others, handle = arguments
    if handle is not None:
        _OPEN[-1].opened.add(handle)
    bare_op("resident_exit", "torch", "cpu")(*others, None)
