"""A stand-in for a GPU, so that what is made for one runs on the CPU: streams and events that do nothing, graphs that
are plain calls, and nodes whose bodies have no effect where nothing opened them."""

from __future__ import annotations

import contextlib
import time
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.end_to_end import check, engines, measure, models
from benchmarks.end_to_end.workloads import Fixed
from benchmarks.gpu import bench, nodes
from benchmarks.gpu.bench import Bench
from earlyexit_kernels.engine import graphs
from earlyexit_kernels.engine.choice import Choice
from earlyexit_kernels.ops import RESIDENT_EXITS

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


class Event:
    """Tells the time of the host."""

    def __init__(self, **_: Any) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        return 1000 * (end.at - self.at)


class Nothing(TorchDispatchMode):
    """Operations that write in place write nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return args[0]


class Nodes:
    """A graph with IF nodes; handles are opened by the exit that is given one."""

    def __init__(self) -> None:
        self.opened: set[int] = set()
        self.made = 0
        self.body = contextlib.ExitStack()

    def handle(self) -> int:
        self.made += 1
        return self.made

    def begin_if(self, handle: int) -> None:
        self.body.enter_context(contextlib.nullcontext() if handle in self.opened else Nothing())

    def end_if(self) -> None:
        self.body.close()


class Turns:
    """Stands for `graphs.ConditionalNodes`: loops are the host's."""

    def __init__(self, graph: Nodes) -> None:
        self.graph = graph
        self.left = 0

    def handle(self, first: int = 0) -> int:
        self.left = first
        return self.graph.handle()

    def repeat(self, handle: int, body: Any) -> None:
        while self.left:
            body()

    def take_turns(self, turn: torch.Tensor, again: int, bodies: Any) -> None:
        bodies[int(turn)]()
        turn += 1
        self.left = int(turn) < len(bodies)


def small_bench() -> Bench:
    """Real numbers of rows, and everything else as small as it goes."""
    return Bench(
        "cpu", "torch", "torch", length=8, width=24, copies=2, nodes=3, products=(8,), shapes=((1, 4), (3, 8)),
        rounds=2, warmup=0,
    )  # fmt: skip


@pytest.fixture
def gpu(monkeypatch, captures) -> Bench:
    """The small bench, with everything that it asks of CUDA replaced."""
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
    monkeypatch.setattr(Bench, "graph_of", lambda self, calls: lambda: [call() for call in calls])
    monkeypatch.setattr(Bench, "conditional_graph", _conditional_graph)
    monkeypatch.setattr(nodes, "RESIDENT_EXITS", {"torch": _opening})
    monkeypatch.setattr(nodes, "ConditionalNodes", Turns)
    monkeypatch.setattr(graphs, "has_conditional_nodes", lambda: True)
    monkeypatch.setattr(graphs, "_plain", lambda loop, stream: loop.launch)
    monkeypatch.setitem(engines.ENGINES, engines.GRAPH, _graph_on_cpu)
    subjects = {name: partial(models.random_subject, name, vocab_size=100, **SIZES) for name in models.SUBJECTS}
    monkeypatch.setattr(models, "SUBJECTS", subjects)
    monkeypatch.setattr(models, "runs_natively", lambda dtype: True)
    monkeypatch.setattr(measure, "REST", 0)
    monkeypatch.setitem(check.PROBES, "cpu", Fixed(4, 8))
    _forget()
    yield small_bench()
    _forget()


def _forget() -> None:
    for cache in (models.subject, engines.engine_model, check.rounding_of, bench._filler):
        cache.cache_clear()


def _graph_on_cpu(model: Any) -> None:
    def answers(inputs: Any, rule: Any) -> Any:
        return model._graphs.run(model.parts, model.backend, model._checked(inputs), *inputs[1:])

    model._answers = answers


def falls_back_on_cpu(model: Any) -> None:
    """As `set_engine("graph")`: what can't be captured runs eagerly."""
    eager, model._engine = model._answers, "graph"
    model.engine_for = lambda rows, length, **_: Choice("graph", "it was asked for")

    def answers(inputs: Any, rule: Any) -> Any:
        out = model.from_graph(model._checked(inputs), *inputs[1:])
        return eager(inputs, rule) if out is None else out

    model._answers = answers


_OPEN: list[Nodes] = []


def _conditional_graph(self: Bench, record: Any, warm_up: Any = lambda: None) -> Any:
    warm_up()

    def replay() -> None:
        _OPEN.append(Nodes())
        record(_OPEN[-1])
        _OPEN.clear()

    return replay


def _opening(*arguments: Any) -> None:
    *others, handle = arguments
    if handle:
        _OPEN[-1].opened.add(handle)
    RESIDENT_EXITS["torch"](*others, 0)
