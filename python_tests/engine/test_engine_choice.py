"""The choice of the engine, its explanation and log, and the path from the model to the cache of graphs."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from support.models import batch_for, early_exit

from earlyexit_kernels import backends
from earlyexit_kernels.criteria import Patience
from earlyexit_kernels.engine import choice, graphs
from earlyexit_kernels.engine.choice import Choice
from earlyexit_kernels.engine.graphs import CaptureError, Graphs, Refusal
from earlyexit_kernels.engine.inputs import Inputs
from earlyexit_kernels.engine.resident_buffers import Bucket
from earlyexit_kernels.engine.view import ModelView
from earlyexit_kernels.errors import BackendUnavailableError
from earlyexit_kernels.hf.execution import Execution


@pytest.fixture
def model():
    return early_exit("bert", pooling="first", criterion=Patience(patience=1))


def run(model, batch):
    return model.execution.graphs.run(model.view(), "torch", Inputs(**batch))


def run_graph(model, ids):
    return model.execution.run_graph(model.view(), Inputs(ids))


def test_engine_is_chosen_and_explained(model, caplog, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    text = str(model.explain(**batch_for(model)))
    assert "engine 'eager': graphs require CUDA" in text and "layers 'fused'" in text
    assert model.engine == "auto"
    model.set_engine("eager")
    assert model.engine == "eager"
    assert model.explain(**batch_for(model)).engine.reason == "it was requested"
    with pytest.raises(ValueError, match="engine: expected one of"):
        model.set_engine("lazy")
    with pytest.raises(BackendUnavailableError, match="runs on CUDA, the model is on 'cpu'"):
        model.set_engine("graph")
    model.execution._engine = "graph"
    ids = batch_for(model)["input_ids"]
    with caplog.at_level(logging.WARNING, "earlyexit_kernels"):
        assert [run_graph(model, ids) for _ in range(2)] == [None, None] and run_graph(model, ids[:0]) is None
    assert caplog.messages == ["engine 'graph' fell back to 'eager': graphs require CUDA"]
    with pytest.raises(ValueError, match=r"expected input_ids of shape \[N, S\], got \[17\]"):
        model.explain(ids[0])
    with pytest.raises(ValueError, match=r"input_ids: expected a tensor \[N, S\], got list"):
        model.explain([[1]])
    model.set_layers("fused")
    assert model.explain(ids).layers == ("fused", "it was requested")
    assert "train mode" in model.train().explain(ids).layers.reason


def test_choices_of_auto_are_logged_once(on_cuda, caplog, monkeypatch):
    model, batch = on_cuda
    model.execution._engine = "auto"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    with caplog.at_level(logging.INFO, "earlyexit_kernels"):
        assert [run_graph(model, batch["input_ids"]) for _ in range(2)] == [None] * 2
        monkeypatch.setitem(choice.FASTEST, "A GPU", ((10**6, "graph"),))
        monkeypatch.setattr(Graphs, "run", _no_memory)
        assert [run_graph(model, batch["input_ids"]) for _ in range(2)] == [None] * 2
    assert caplog.messages == [
        "engine 'auto' chose 'eager': no measurement of A GPU is in the table",
        "engine 'auto' chose 'graph': it was the fastest on A GPU up to 1000000 padded tokens a batch",
        "engine 'auto' fell back to 'eager': no memory",
    ]


def _no_memory(*_):
    raise CaptureError("no memory")


@pytest.fixture
def on_cuda(model, monkeypatch):
    """A model that reports a CUDA device, with the graph engine requested."""
    monkeypatch.setattr(ModelView, "device", torch.device("cuda"))
    monkeypatch.setattr(Execution, "backend", lambda *_: "triton")
    monkeypatch.setattr(backends, "available_backends", lambda kind: {"triton": ""})
    model.execution._engine = "graph"
    return model, batch_for(model)


def test_reason_against_a_graph_is_explained(on_cuda, monkeypatch):
    model, batch = on_cuda
    assert model.explain(**batch).engine == ("graph", "it was requested")
    key = graphs.key_of(model.view(), "triton", *batch["input_ids"].shape)
    model.execution.graphs._refused[key] = Refusal("capturing failed", math.inf, math.inf)
    assert model.explain(**batch).engine == ("eager", "capturing failed")
    assert model.explain(batch["input_ids"][:1]).engine.name == "graph", "another bucket"
    monkeypatch.setattr(graphs, "MAX_TOKENS", 128)
    assert model.explain(batch["input_ids"].repeat(3, 1)).engine.reason == "capturing failed", "one chunk of the batch"
    monkeypatch.setattr(Execution, "backend", lambda *_: "torch")
    assert "back-end 'torch' reads counts" in model.explain(batch["input_ids"][:1]).engine.reason
    monkeypatch.setattr(backends, "available_backends", lambda kind: {"triton": "it is missing"})
    assert "it is missing" in model.explain(batch["input_ids"][:1]).engine.reason
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: True)
    assert "do not support autocast" in model.explain(batch["input_ids"][:1]).engine.reason


def test_model_with_a_graph_is_not_checked_twice(captures, on_cuda, monkeypatch):
    """For a batch of one row the check takes as long as the batch; `explain` does it, and `run` detects changes."""
    model, batch = on_cuda
    key = graphs.key_of(model.view(), "triton", *batch["input_ids"].shape)
    run(model, batch)
    ((other, captured),) = model.execution.graphs._captured.items()
    model.execution.graphs._captured[key] = captured
    looks = []
    monkeypatch.setattr(graphs, "resident_unsupported_reason", lambda *_: looks.append(1) or "no more")
    assert model.execution.choose_engine(model.view(), *batch["input_ids"].shape).name == "graph" and not looks
    model.backbone.encoder.layer[0].register_forward_hook(lambda *_: None)
    assert "no more" in model.explain(**batch).engine.reason and looks
    model.execution.graphs._captured[other] = captured
    with pytest.raises(CaptureError, match="no more"):
        run(model, batch)


def test_run_graph_answers_like_forward(captures, model, monkeypatch):
    batch = batch_for(model)
    batch["token_type_ids"] = torch.randint(0, 2, batch["input_ids"].shape)
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).flip(0)[None]
    expected = model(**batch)
    monkeypatch.setattr(Execution, "choose_engine", lambda *_: Choice("graph", "a test"))
    monkeypatch.setattr(Execution, "backend", lambda *_: "torch")
    got = model.execution.run_graph(model.view(), Inputs(**batch))
    assert torch.equal(got.exit_layer, expected.exit_layer) and captures == [Bucket(4, 32)]
    torch.testing.assert_close(got.logits, expected.logits, atol=2e-5, rtol=1e-4)


def test_run_graph_is_not_compiled(captures, on_cuda, monkeypatch):
    model, batch = on_cuda
    key = graphs.key_of(model.view(), "torch", *batch["input_ids"].shape)
    monkeypatch.setattr(graphs, "key_of", lambda *_: key)
    traced = []
    compiled = torch.compile(
        lambda ids: run_graph(model, ids).exit_layer + 0,
        backend=lambda graph, _: (traced.append(graph), graph.forward)[1],
    )
    for ids in (batch["input_ids"], batch["input_ids"].flip(0)):
        assert torch.equal(compiled(ids), run_graph(model, ids).exit_layer)
    assert captures == [Bucket(4, 32)] and len(traced) == 1, "only the addition is compiled"


def test_table_of_fastest_engines(monkeypatch):
    monkeypatch.setattr(choice, "FASTEST", {"H200": ((4096, "graph"), (8192, "eager"))})
    fastest = choice.fastest
    assert [fastest("NVIDIA H200", 32, s).name for s in (128, 129, 4096)] == ["graph", "eager", "eager"]
    assert fastest("NVIDIA H200", 32, 129).reason.endswith("fastest on NVIDIA H200 up to 8192 padded tokens a batch")
    assert fastest("NVIDIA H200", 32, 4096).reason.endswith("at 8192 padded tokens a batch, the most that was measured")
    assert fastest("NVIDIA A10", 1, 1) == ("eager", "no measurement of NVIDIA A10 is in the table")
