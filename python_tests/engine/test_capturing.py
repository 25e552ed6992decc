"""Captures of the graph engine with IF nodes of the extension, with those of torch and without, on a CPU."""

from __future__ import annotations

import logging
import os
import threading
import time

import pytest
import torch
from support.fake_gpu import falls_back_on_cpu
from support.models import batch_for, early_exit

from earlyexit_kernels.criteria import Entropy, HiddenCosine, Patience
from earlyexit_kernels.engine import capturing, graphs, resident_postnorm
from earlyexit_kernels.engine.capturing import available_nodes, capture, nodes_for, record
from earlyexit_kernels.engine.inputs import Inputs
from earlyexit_kernels.engine.resident_buffers import Activations, Bucket
from earlyexit_kernels.hf.execution import Execution
from earlyexit_kernels.ops.resident_exit import LIVE

IF = ["begin_if", "end_if"]
#: Exits after four layers have three nodes between them.
WITH_NODES = {
    "torch": ["begin", *IF, *IF, *IF, "end"],
    "none": ["begin", "end"],
    "extension": ["begin", "handle", "handle", *IF, "handle", *IF, *IF, "end"],
}
BACKEND = {"torch": "triton", "none": "triton", "extension": "cpp"}


@pytest.fixture
def model():
    return early_exit("bert", pooling="first", criterion=Entropy(threshold=0.7))


@pytest.fixture
def nodes(request, monkeypatch):
    """The kind of nodes of a test, made available here."""
    if request.param == "none":
        monkeypatch.setattr(capturing, "TORCH_CALLS", ("no_such_call",))
    return request.param


EVERY_KIND = pytest.mark.parametrize("nodes", WITH_NODES, indirect=True)
NODES = pytest.mark.parametrize("nodes", ["torch", "extension"], indirect=True)


@EVERY_KIND
def test_kind_of_nodes_is_announced(cuda_captures, model, nodes, caplog):
    with caplog.at_level(logging.INFO, "earlyexit_kernels"):
        captured = capture(model.view(), Bucket(4, 32), BACKEND[nodes], cuda_captures.new_stream())
    assert cuda_captures.said == WITH_NODES[nodes] and cuda_captures.current is cuda_captures.default
    captured.replay()
    assert cuda_captures.said[-1] == "replay"
    found = nodes_for(model.view(), BACKEND[nodes])
    assert found.name == nodes
    assert caplog.messages == [f"captured Bucket(rows=4, length=32); IF nodes {nodes!r}: {found.reason}"]


def test_torch_without_the_calls_has_no_nodes(cuda_captures, model, monkeypatch):
    for call in capturing.TORCH_CALLS:
        with monkeypatch.context() as patch:
            patch.delattr(cuda_captures.Graph.__bases__[0], call)
            found = available_nodes("triton")
        assert found == ("none", f"torch {torch.__version__} has no CUDAGraph.{call}")
        assert nodes_for(model.view(), "cpp").name == "extension", "its own nodes do not depend on torch's"


@pytest.mark.parametrize("built", [{"pooling": "first"}, {"method": "palbert"}, {"pooling": None}, {"pooling": "mean"}])
def test_exits_of_torch_modules_have_no_nodes_of_torch(cuda_captures, built):
    """Their products would use workspaces by the address of a stream that torch destroys after the body."""
    modules = early_exit("bert", criterion=HiddenCosine(threshold=0.9), pooling="first")
    assert nodes_for(modules.view(), "triton").name == "none" and nodes_for(modules.view(), "cpp").name == "extension"
    assert "share workspaces" in nodes_for(modules.view(), "triton").reason
    kernels = early_exit("bert", criterion=Entropy(threshold=0.9), **built)
    assert nodes_for(kernels.view(), "triton").name == "torch"


@pytest.mark.parametrize("deepest", [1, 2, 3, 4])
def test_conditions_of_torch_are_read_from_the_exit_before(cuda_captures, model, deepest):
    batch = batch_for(model)
    with torch.no_grad():
        for out in model.heads.out:  # rows whose class never changes leave one layer after the patience
            out.bias[0] += 50
    model.set_criterion(Patience(patience=deepest - 1) if deepest > 1 else Entropy(threshold=2.0))
    loop = capturing.ResidentLoop(model.view(), Bucket(4, 32))
    loop.load(Inputs(**batch))
    stream = cuda_captures.new_stream()
    with cuda_captures.stream(stream):
        record("torch", loop.launch, stream)
        assert cuda_captures.current is stream
    out = model(**batch)
    assert int(out.exit_layer.max()) == deepest
    assert cuda_captures.conditions == [layer < deepest for layer in (1, 2, 3)]
    assert torch.equal(loop.exit_layer, out.exit_layer)
    torch.testing.assert_close(loop.answers, out.logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("rows", [0, 1, 255, 256, 1024])
def test_condition_is_one_byte_of_the_counts(cuda_captures, rows):
    counts = torch.tensor([[1] * 6, [rows, 7, 0, 7, int(rows > 0), 0]], dtype=torch.int32)[1]
    graph = cuda_captures.Graph()
    with cuda_captures.stream(cuda_captures.new_stream()):
        graph.capture_begin(capture_error_mode="thread_local")
        capturing.TorchNodes(graph).when(None, counts, lambda: None)
    assert cuda_captures.conditions == [rows > 0] and int(counts[LIVE]) == (rows > 0)


class Interrupt(BaseException):
    """As an interrupt by the user."""


@pytest.mark.parametrize("kind", [RuntimeError, torch.OutOfMemoryError, Interrupt])
@NODES
def test_capture_is_ended_when_a_body_raises(cuda_captures, model, nodes, kind, monkeypatch):
    op, calls, error = resident_postnorm.rows_attention, [], kind("a body broke")

    def fails(*arguments, **how):
        calls.append(1)
        if len(calls) == 2 + 4 * capturing.WARM_UPS:  # in the second layer, the first with a node
            raise error
        return op(*arguments, **how)

    monkeypatch.setattr(resident_postnorm, "rows_attention", fails)
    with pytest.raises(kind) as raised:
        capture(model.view(), Bucket(4, 32), BACKEND[nodes], cuda_captures.new_stream())
    assert raised.value is error and cuda_captures.current is cuda_captures.default
    if nodes == "torch":
        assert cuda_captures.said == ["begin", *IF, "end"] and not capturing._BROKEN
    else:
        assert cuda_captures.said == ["begin", "handle", "handle", "begin_if", "abandon"]


def test_capture_of_torch_is_ended_on_its_stream_when_a_body_cannot_be(cuda_captures, model, monkeypatch):
    monkeypatch.setattr(capturing, "_BROKEN", [])
    cuda_captures.errors["end_if"] = RuntimeError("operation failed due to a previous error during capture")
    with pytest.raises(RuntimeError, match="a previous error during capture"):
        capture(model.view(), Bucket(4, 32), "triton", cuda_captures.new_stream())
    assert cuda_captures.said == ["begin", *IF, "end"] and cuda_captures.current is cuda_captures.default
    assert len(capturing._BROKEN) == 1, "its destruction would change the current stream of a thread"


NO_NODES = "CUDA error: API call is not supported in the installed CUDA driver"
INVALID = "CUDA error: operation failed due to a previous error during capture"
NOT_MADE = "ConditionalGraph: cudaGraphInstantiateWithParams failed with result 1: operation not supported"
#: Kind of nodes and call -> the error of a driver or a card that does not support it.
REFUSED = {
    ("torch", "begin"): "CUDA error: operation not permitted",
    ("torch", "begin_if"): NO_NODES,
    ("torch", "end_if"): INVALID,
    ("torch", "end"): "CUDA error: operation not supported",
    ("none", "end"): INVALID,
    ("extension", "begin"): "CUDA error: operation not permitted",
    ("extension", "handle"): NO_NODES,
    ("extension", "end_if"): INVALID,
    ("extension", "end"): NOT_MADE,
}


@pytest.fixture
def on_graph(cuda_captures, model, nodes, monkeypatch):
    """Return a function that runs a batch on the graph engine and compares its answers with those of the eager one."""
    monkeypatch.setattr(capturing, "_BROKEN", [])
    batch = batch_for(model)
    expected = model(**batch)
    monkeypatch.setattr(Execution, "backend", lambda *_: BACKEND[nodes])
    falls_back_on_cpu(model)

    def run() -> None:
        out = model(**batch)
        assert torch.equal(out.logits, expected.logits) and torch.equal(out.exit_layer, expected.exit_layer)

    return run


@pytest.mark.parametrize(("nodes", "call"), REFUSED, indirect=["nodes"])
def test_refused_call_is_logged_once_and_the_model_runs_eagerly(cuda_captures, on_graph, nodes, call, caplog):
    message = REFUSED[nodes, call]
    error = cuda_captures.errors[call] = RuntimeError(f"{message}\nmore")
    with caplog.at_level(logging.WARNING, "earlyexit_kernels"):
        for _ in range(2):
            on_graph()
    (logged,) = caplog.records
    assert logged.message == (
        f"engine 'graph' fell back to 'eager': capturing Bucket(rows=4, length=32) failed: {message}"
    )
    assert logged.exc_info[1] is error, "with the traceback"
    assert cuda_captures.said.count("begin") == 1, "the capture is not tried again"
    assert nodes != "extension" or cuda_captures.said[-1] == "abandon"


@EVERY_KIND
def test_buffers_without_memory_are_tried_again_later(cuda_captures, on_graph, model, nodes, monkeypatch, caplog):
    now, tried, makes = [0.0], [], Activations.new

    def new(*arguments, **how):
        tried.append(now[0])
        if now[0] < 100:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")
        return makes(*arguments, **how)

    monkeypatch.setattr(Activations, "new", new)
    monkeypatch.setattr(graphs.time, "monotonic", lambda: now[0])
    with caplog.at_level(logging.WARNING, "earlyexit_kernels"):
        for now[0] in (0.0, 10.0, 31.0, 60.0):
            on_graph()
    (logged,) = caplog.records
    assert logged.message.endswith("failed: CUDA out of memory. Tried to allocate 3.00 GiB") and logged.exc_info
    assert tried == [0.0, 31.0] and not cuda_captures.said, "no capture has begun"
    now[0] = 100.0
    key = graphs.key_of(model.view(), BACKEND[nodes], 4, 32)
    model.execution.graphs._get_or_capture(key, model.view(), cuda_captures.new_stream())
    assert cuda_captures.said == WITH_NODES[nodes] and tried == [0.0, 31.0, 100.0]


def test_explanation_names_the_nodes(cuda_captures, model, monkeypatch):
    batch = batch_for(model)
    assert model.explain(**batch).nodes is None
    falls_back_on_cpu(model)
    monkeypatch.setattr(Execution, "backend", lambda *_: "triton")
    found = model.explain(**batch)
    assert found.nodes.name == "torch"
    assert str(found).splitlines()[-1] == f"IF nodes 'torch': {found.nodes.reason}"


def test_one_model_captures_at_a_time(cuda_captures, monkeypatch):
    """Two threads capture two models; also in a child of a process that was forked during a capture."""
    under_way, most = [], []

    def slowly(nodes, launch, stream):
        under_way.append(stream)
        most.append(len(under_way))
        time.sleep(0.05)
        under_way.pop()
        return lambda: None

    monkeypatch.setattr(capturing, "record", slowly)
    views = [early_exit("bert", seed=seed, pooling="first", criterion=Patience(patience=2)).view() for seed in range(2)]
    threads = [
        threading.Thread(target=capture, args=(view, Bucket(2, 16), "torch", cuda_captures.new_stream()))
        for view in views
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="requires fork")
def test_child_of_a_process_that_captures_can_capture():
    held, release = threading.Event(), threading.Event()

    def hold():
        with capturing.CAPTURES:
            held.set()
            release.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        os._exit(0 if capturing.CAPTURES._lock.acquire(blocking=False) else 1)
    release.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
