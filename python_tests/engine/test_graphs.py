"""The bookkeeping of the graph engine, with captures that are plain runs of the loop: no GPU is needed for it."""

from __future__ import annotations

import copy
import logging
import pickle
from functools import partial

import pytest
import torch
from support.models import batch_for, early_exit
from torch.multiprocessing.reductions import StorageWeakRef

from earlyexit_kernels import backends
from earlyexit_kernels.criteria import Entropy, Patience
from earlyexit_kernels.engine import choice, graphs
from earlyexit_kernels.engine.choice import Choice
from earlyexit_kernels.engine.graphs import CaptureError, ConditionalNodes, Graphs, most_rows
from earlyexit_kernels.engine.resident import Bucket
from earlyexit_kernels.errors import BackendUnavailableError


@pytest.fixture
def model():
    return early_exit("bert", pooling="first", criterion=Patience(patience=1))


def run(runner: Graphs, model, batch):
    return runner.run(model.parts, "torch", batch["input_ids"], batch.get("attention_mask"), None, None)


def assert_as_eager(out, model, batch) -> None:
    expected = model(**batch)
    assert torch.equal(out.exit_layer, expected.exit_layer) and torch.equal(out.layers_run, expected.layers_run)
    torch.testing.assert_close(out.logits, expected.logits, atol=2e-5, rtol=1e-4)


def test_a_graph_is_captured_once_a_bucket(captures, model):
    runner = Graphs()
    for lengths in [(17, 3, 9), (20, 4, 4, 4), (17,), (18,), (5, 6, 30)]:
        batch = batch_for(model, lengths=lengths)
        assert_as_eager(run(runner, model, batch), model, batch)
    assert captures == [Bucket(4, 32), Bucket(1, 32)]
    runner.forget()
    run(runner, model, batch)
    assert len(captures) == 3


def test_a_large_batch_is_split(captures, model, monkeypatch):
    monkeypatch.setattr(graphs, "MOST_TOKENS", 64)
    assert (most_rows(17), most_rows(16), most_rows(64)) == (2, 4, 1)
    batch = batch_for(model, lengths=(17, 3, 9, 12, 6))
    out = run(Graphs(), model, batch)
    assert_as_eager(out, model, batch)
    assert captures == [Bucket(2, 32), Bucket(1, 32)] and len(out.invalid_rows) == model.depth
    assert most_rows(100) == 1


def test_the_graph_unused_for_longest_goes(captures, model, monkeypatch):
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    runner, batches = (
        Graphs(),
        [batch_for(model, lengths=lengths) for lengths in [(5,), (5, 5), (5,), (40,), (5,), (5, 5)]],
    )
    for batch in batches:
        run(runner, model, batch)
    assert captures == [Bucket(1, 16), Bucket(2, 16), Bucket(1, 64), Bucket(2, 16)]


def test_other_weights_and_criteria_have_graphs_of_their_own(captures, model):
    runner, batch = Graphs(), batch_for(model)
    run(runner, model, batch)
    value = model.backbone.encoder.layer[1].attention.self.value
    value.weight = torch.nn.Parameter(value.weight.detach() * 2)
    assert_as_eager(run(runner, model, batch), model, batch)
    model.heads.out[0] = torch.nn.Linear(64, 3)
    assert_as_eager(run(runner, model, batch), model, batch)
    assert len(captures) == 3
    model.set_criterion(Entropy(threshold=0.3))
    assert_as_eager(run(runner, model, batch), model, batch)
    assert len(captures) == 4


def test_a_graph_made_in_one_mode_of_autograd_serves_in_every_other(captures, model):
    runner, batch = Graphs(), batch_for(model)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            out = run(runner, model, {name: x.clone() for name, x in batch.items()})
        assert not out.logits.requires_grad
        assert_as_eager(out, model, batch)
    assert len(captures) == 1


def test_the_memory_a_graph_reads_is_there_while_it_can_be_replayed(captures, model):
    runner, batch = Graphs(), batch_for(model)
    run(runner, model, batch)
    for module in (model.backbone.embeddings.word_embeddings, model.heads.out[0]):
        before = StorageWeakRef(module.weight.untyped_storage())
        module.weight.data = module.weight.data.clone()
        assert not before.expired()
        run(runner, model, batch)
        assert before.expired(), "another graph has been captured, and nothing reads this any more"
    assert len(captures) == 3


class TritonError(Exception):
    """As Triton's own, which is no RuntimeError."""


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, TritonError])
def test_what_cannot_be_captured_is_said_and_not_tried_again(captures, model, monkeypatch, kind):
    tried = []

    def fails(*args):
        tried.append(args)
        raise kind("CUDA out of memory\nmore")

    monkeypatch.setattr(graphs, "capture", fails)
    runner, batch = Graphs(), batch_for(model)
    for _ in range(2):
        with pytest.raises(CaptureError, match=r"capturing Bucket\(rows=4, length=32\) failed: CUDA out of memory$"):
            run(runner, model, batch)
    assert len(tried) == 1


def test_other_graphs_make_room_for_one_that_lacks_memory(captures, model, monkeypatch):
    runner, makes = Graphs(), graphs.capture
    run(runner, model, batch_for(model, lengths=(5,)))

    def fails(*args):
        if runner._captured:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return makes(*args)

    monkeypatch.setattr(graphs, "capture", fails)
    run(runner, model, batch_for(model))
    assert captures == [Bucket(1, 16), Bucket(4, 32)] and len(runner._captured) == 1


def test_a_capture_waits_for_what_the_caller_did_to_the_weights(captures, model):
    torch.cuda.current_stream(None).wait_stream = lambda other: captures.append("wait")
    run(Graphs(), model, batch_for(model))
    assert captures[:2] == ["wait", Bucket(4, 32)]


def test_another_device_has_graphs_of_its_own(model):
    here, there = (graphs.key_of(each.parts, "triton", 3, 17) for each in (model, copy.deepcopy(model).to("meta")))
    assert here.device.type == "cpu" and there == here._replace(device=torch.device("meta"))


def test_graphs_of_weights_that_are_others_go_before_a_capture(captures, model):
    runner = Graphs()
    for lengths in [(17, 3, 9), (17,), (17, 3)]:
        run(runner, model, batch_for(model, lengths=lengths))
        model.heads.out[0] = torch.nn.Linear(64, 3)
    assert [key.bucket for key in runner._captured] == [Bucket(2, 32)]


def test_training_drops_the_graphs(captures, model):
    """Optimizers may write through `weight.data`, which leaves no trace."""
    run(model._graphs, model, batch_for(model))
    model.train().eval()
    assert not model._graphs._captured


def test_a_capture_of_the_users_own_is_left_alone(captures, model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(CaptureError, match="fixed_depth"):
        run(Graphs(), model, batch_for(model))


def test_nodes_are_opened_and_closed_around_their_bodies():
    said = []

    class Graph:
        def __getattr__(self, name):
            return lambda *given: said.append((name, *given)) or len(said)

    nodes = ConditionalNodes(Graph())
    said.clear()
    assert nodes.repeats
    nodes.when(7, lambda: said.append("body"))
    assert said == [("begin_if", 7), "body", ("end_if",)]
    said.clear()
    turn = torch.zeros(1, dtype=torch.int32)
    nodes.repeat(nodes.handle(1), lambda: nodes.take_turns(turn, 1, [partial(said.append, name) for name in "ab"]))
    assert said == [
        ("handle", 1),
        ("begin_while", 1),
        ("handle",),
        ("take_turn", turn, 3, 1, 2),
        ("begin_switch", 3, 2),
        "a",
        ("next_case",),
        "b",
        ("end_switch",),
        ("end_while",),
    ]


def test_copies_start_without_graphs(model):
    model._graphs._refused["key"] = "a reason"
    assert copy.deepcopy(model)._graphs._refused == {} == pickle.loads(pickle.dumps(model._graphs))._refused


def test_the_engine_is_chosen_and_explained(model, caplog, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    text = str(model.explain(**batch_for(model)))
    assert "engine 'eager': graphs are for CUDA" in text and "layers 'fused'" in text
    model.set_engine("eager")
    assert model.explain(**batch_for(model)).engine.reason == "it was asked for"
    with pytest.raises(ValueError, match="engine: expected one of"):
        model.set_engine("lazy")
    with pytest.raises(BackendUnavailableError, match="runs on CUDA, the model is on 'cpu'"):
        model.set_engine("graph")
    model._engine = "graph"
    ids = batch_for(model)["input_ids"]
    with caplog.at_level(logging.WARNING, "earlyexit_kernels"):
        assert [model.from_graph(ids) for _ in range(2)] == [None, None] and model.from_graph(ids[:0]) is None
    assert caplog.messages == ["engine 'graph' fell back to 'eager': graphs are for CUDA"]
    with pytest.raises(ValueError, match=r"expected input_ids of shape \[N, S\], got \[17\]"):
        model.explain(ids[0])
    with pytest.raises(ValueError, match=r"expected input_ids of shape \[N, S\], got list"):
        model.explain([[1]])
    model.set_layers("fused")
    assert model.explain(ids).layers == ("fused", "they were asked for")
    assert "train mode" in model.train().explain(ids).layers.reason


def test_what_auto_does_is_said_once(on_cuda, caplog, monkeypatch):
    model, batch = on_cuda
    model._engine = "auto"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    with caplog.at_level(logging.INFO, "earlyexit_kernels"):
        assert [model.from_graph(batch["input_ids"], None, None, None) for _ in range(2)] == [None] * 2
        monkeypatch.setitem(choice.FASTEST, "A GPU", ((10**6, "graph"),))
        monkeypatch.setattr(Graphs, "run", _no_memory)
        assert [model.from_graph(batch["input_ids"], None, None, None) for _ in range(2)] == [None] * 2
    assert caplog.messages == [
        "engine 'auto' chose 'eager': no measurement of A GPU is in the table",
        "engine 'auto' chose 'graph': it was the fastest on A GPU up to 1000000 padded tokens a batch",
        "engine 'auto' fell back to 'eager': no memory",
    ]


def _no_memory(*_):
    raise CaptureError("no memory")


@pytest.fixture
def on_cuda(model, monkeypatch):
    """The model says that it is on a GPU, and its graph engine was asked for."""
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    monkeypatch.setattr(type(model), "backend", "triton")
    monkeypatch.setattr(backends, "available_backends", lambda kind: {"triton": ""})
    model._engine = "graph"
    return model, batch_for(model)


def test_what_stands_against_a_graph_is_explained(on_cuda, monkeypatch):
    model, batch = on_cuda
    assert model.explain(**batch).engine == ("graph", "it was asked for")
    model._graphs._refused[graphs.key_of(model.parts, "triton", *batch["input_ids"].shape)] = "capturing failed"
    assert model.explain(**batch).engine == ("eager", "capturing failed")
    assert model.explain(batch["input_ids"][:1]).engine.name == "graph", "another bucket"
    monkeypatch.setattr(graphs, "MOST_TOKENS", 128)
    assert model.explain(batch["input_ids"].repeat(3, 1)).engine.reason == "capturing failed", "a part of the batch"
    monkeypatch.setattr(type(model), "backend", "torch")
    assert "back-end 'torch' reads counts" in model.explain(batch["input_ids"][:1]).engine.reason
    monkeypatch.setattr(backends, "available_backends", lambda kind: {"triton": "it is missing"})
    assert "it is missing" in model.explain(batch["input_ids"][:1]).engine.reason


def test_what_has_a_graph_is_not_looked_at_again(captures, on_cuda, monkeypatch):
    """At one row a batch that look takes as long as the batch; `explain` takes it, and `run` sees what has changed."""
    model, batch = on_cuda
    key = graphs.key_of(model.parts, "triton", *batch["input_ids"].shape)
    run(model._graphs, model, batch)
    ((other, captured),) = model._graphs._captured.items()
    model._graphs._captured[key] = captured
    looks = []
    monkeypatch.setattr(graphs, "why_not_resident", lambda *_: looks.append(1) or "no more")
    assert model.engine_for(*batch["input_ids"].shape).name == "graph" and not looks
    model.backbone.encoder.layer[0].register_forward_hook(lambda *_: None)
    assert "no more" in model.explain(**batch).engine.reason and looks
    model._graphs._captured[other] = captured
    with pytest.raises(CaptureError, match="no more"):
        run(model._graphs, model, batch)


def test_a_model_answers_from_its_graphs(captures, model, monkeypatch):
    batch = batch_for(model)
    batch["token_type_ids"] = torch.randint(0, 2, batch["input_ids"].shape)
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).flip(0)[None]
    expected = model(**batch)
    monkeypatch.setattr(type(model), "engine_for", lambda self, rows, length, **_: Choice("graph", "a test"))
    monkeypatch.setattr(type(model), "backend", "torch")
    got = model.from_graph(*(batch[name] for name in ("input_ids", "attention_mask", "token_type_ids", "position_ids")))
    assert torch.equal(got.exit_layer, expected.exit_layer) and captures == [Bucket(4, 32)]
    torch.testing.assert_close(got.logits, expected.logits, atol=2e-5, rtol=1e-4)


def test_a_compiled_caller_runs_it_as_it_is(captures, on_cuda, monkeypatch):
    model, batch = on_cuda
    key = graphs.key_of(model.parts, "torch", *batch["input_ids"].shape)
    monkeypatch.setattr(graphs, "key_of", lambda *_: key)
    traced = []
    compiled = torch.compile(
        lambda ids: model.from_graph(ids, None, None, None).exit_layer + 0,
        backend=lambda graph, _: (traced.append(graph), graph.forward)[1],
    )
    for ids in (batch["input_ids"], batch["input_ids"].flip(0)):
        assert torch.equal(compiled(ids), model.from_graph(ids, None, None, None).exit_layer)
    assert captures == [Bucket(4, 32)] and len(traced) == 1, "what is behind the addition alone"


def test_the_table_of_the_fastest(monkeypatch):
    monkeypatch.setattr(choice, "FASTEST", {"H200": ((4096, "graph"), (8192, "eager"))})
    fastest = choice.fastest
    assert [fastest("NVIDIA H200", 32, s).name for s in (128, 129, 4096)] == ["graph", "eager", "eager"]
    assert fastest("NVIDIA H200", 32, 129).reason.endswith("fastest on NVIDIA H200 up to 8192 padded tokens a batch")
    assert fastest("NVIDIA H200", 32, 4096).reason.endswith("at 8192 padded tokens a batch, the most that was measured")
    assert fastest("NVIDIA A10", 1, 1) == ("eager", "no measurement of NVIDIA A10 is in the table")
