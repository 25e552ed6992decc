"""The cache of the graph engine, with captures replaced by runs of the loop, so that no GPU is required."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import weakref

import pytest
import torch
from support.models import batch_for, early_exit
from torch.multiprocessing.reductions import StorageWeakRef

from earlyexit_kernels.criteria import Entropy, Patience
from earlyexit_kernels.engine import graphs
from earlyexit_kernels.engine.graphs import CaptureError, Graphs, max_rows
from earlyexit_kernels.engine.inputs import Inputs
from earlyexit_kernels.engine.resident_buffers import Bucket


@pytest.fixture
def model():
    return early_exit("bert", pooling="first", criterion=Patience(patience=1))


def run(runner: Graphs, model, batch):
    return runner.run(model.view(), "torch", Inputs(**batch))


def run_graph(model, ids):
    return model.execution.run_graph(model.view(), Inputs(ids))


def assert_as_eager(out, model, batch) -> None:
    expected = model(**batch)
    assert torch.equal(out.exit_layer, expected.exit_layer) and torch.equal(out.layers_run, expected.layers_run)
    torch.testing.assert_close(out.logits, expected.logits, atol=2e-5, rtol=1e-4)


def test_one_capture_per_bucket(captures, model):
    runner = Graphs()
    for lengths in [(17, 3, 9), (20, 4, 4, 4), (17,), (18,), (5, 6, 30)]:
        batch = batch_for(model, lengths=lengths)
        assert_as_eager(run(runner, model, batch), model, batch)
    assert captures == [Bucket(4, 32), Bucket(1, 32)]
    runner.forget()
    run(runner, model, batch)
    assert len(captures) == 3


def test_masked_first_token_is_named_by_its_row(captures, model, monkeypatch):
    """Also in a batch that several launches answer."""
    monkeypatch.setattr(graphs, "MAX_TOKENS", 64)
    batch = batch_for(model, lengths=(17, 3, 9, 12, 6))
    batch["attention_mask"][3:, 0] = 0
    for call in (lambda: run(Graphs(), model, batch), lambda: model(**batch)):
        with pytest.raises(ValueError, match="the first token of row 3 is masked"):
            call()


def test_large_batch_is_split(captures, model, monkeypatch):
    monkeypatch.setattr(graphs, "MAX_TOKENS", 64)
    assert (max_rows(17), max_rows(16), max_rows(64)) == (2, 4, 1)
    batch = batch_for(model, lengths=(17, 3, 9, 12, 6))
    out = run(Graphs(), model, batch)
    assert_as_eager(out, model, batch)
    assert captures == [Bucket(2, 32), Bucket(1, 32)] and len(out.invalid_rows) == model.depth
    assert max_rows(100) == 1


def test_least_recently_used_graph_is_dropped(captures, model, monkeypatch):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    runner, batches = (
        Graphs(),
        [batch_for(model, lengths=lengths) for lengths in [(5,), (5, 5), (5,), (40,), (5,), (5, 5)]],
    )
    for batch in batches:
        run(runner, model, batch)
    assert captures == [Bucket(1, 16), Bucket(2, 16), Bucket(1, 64), Bucket(2, 16)]


def test_replaced_weights_and_other_criteria_need_a_capture(captures, model):
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


def test_prenorm_encoder(captures):
    model, runner = early_exit("modernbert", pooling="mean", criterion=Patience(patience=1)), Graphs()
    for lengths, kind in [((17, 3, 9), "holes"), ((20, 4, 4, 4), "right"), ((17,), "full")]:
        batch = batch_for(model, kind, lengths=lengths)
        assert_as_eager(run(runner, model, batch), model, batch)
    assert captures == [Bucket(4, 32), Bucket(1, 32)]


def test_graph_is_used_in_every_autograd_mode(captures, model):
    runner, batch = Graphs(), batch_for(model)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            out = run(runner, model, {name: x.clone() for name, x in batch.items()})
        assert not out.logits.requires_grad
        assert_as_eager(out, model, batch)
    assert len(captures) == 1


def test_graph_keeps_the_weights_it_reads_alive(captures, model):
    runner, batch = Graphs(), batch_for(model)
    run(runner, model, batch)
    for module in (model.backbone.embeddings.word_embeddings, model.heads.out[0]):
        before = StorageWeakRef(module.weight.untyped_storage())
        module.weight.data = module.weight.data.clone()
        assert not before.expired()
        run(runner, model, batch)
        assert before.expired(), "the stale graph has been dropped"
    assert len(captures) == 3


class TritonError(Exception):
    """Like the errors of Triton, which are not RuntimeErrors."""


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, TritonError])
def test_failed_capture_is_reported_and_not_repeated_at_once(captures, model, monkeypatch, kind):
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


@pytest.mark.parametrize(
    ("kind", "tries"), [(torch.OutOfMemoryError, [0, 30, 90, 210, 300, 330]), (TritonError, [0, 300])]
)
def test_capture_without_memory_is_tried_again_later(captures, model, monkeypatch, kind, tries):
    """After 30 seconds, then after twice as long each time; other failures are final until `forget`."""
    now, tried, makes = 0, [], graphs.capture

    def fails(*args):
        tried.append(now)
        raise kind("CUDA out of memory")

    monkeypatch.setattr(graphs.time, "monotonic", lambda: now)
    monkeypatch.setattr(graphs, "capture", fails)
    runner, batch = Graphs(), batch_for(model)
    view, shape = model.view(), batch["input_ids"].shape
    for now in range(0, 340, 10):
        if now == 300:
            runner.forget()
        refused = runner.unsupported_reason(view, "torch", *shape)
        with pytest.raises(CaptureError, match="CUDA out of memory"):
            run(runner, model, batch)
        assert (refused is None) == (tried[-1] == now)
    assert tried == tries
    now = 1000
    if kind is TritonError:
        runner.forget()
    monkeypatch.setattr(graphs, "capture", makes)
    assert_as_eager(run(runner, model, batch), model, batch)
    assert not runner._refused and captures == [Bucket(4, 32)]


def test_buffers_of_a_failed_capture_are_freed_before_the_next_try(captures, model, monkeypatch):
    runner, makes, held, alive = Graphs(), graphs.capture, [], []
    run(runner, model, batch_for(model, lengths=(5,)))

    def fails_first(*arguments):
        captured = makes(*arguments)
        if not held:
            held.append(weakref.ref(captured.loop))
            raise torch.OutOfMemoryError("CUDA out of memory")
        alive.append(held[0]())
        return captured

    monkeypatch.setattr(graphs, "capture", fails_first)
    run(runner, model, batch_for(model))
    assert alive == [None]


def test_graphs_are_dropped_when_a_capture_runs_out_of_memory(captures, model, monkeypatch):
    runner, makes = Graphs(), graphs.capture
    run(runner, model, batch_for(model, lengths=(5,)))

    def fails(*args):
        if runner._captured:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return makes(*args)

    monkeypatch.setattr(graphs, "capture", fails)
    run(runner, model, batch_for(model))
    assert captures == [Bucket(1, 16), Bucket(4, 32)] and len(runner._captured) == 1


def test_capture_waits_for_the_stream_of_the_caller(captures, model):
    torch.cuda.current_stream(None).wait_stream = lambda other: captures.append("wait")
    run(Graphs(), model, batch_for(model))
    assert captures[:2] == ["wait", Bucket(4, 32)]


def test_key_contains_the_device(model):
    here, there = (graphs.key_of(each.view(), "triton", 3, 17) for each in (model, copy.deepcopy(model).to("meta")))
    assert here.device.type == "cpu" and there == here._replace(device=torch.device("meta"))


def test_stale_graphs_are_dropped_before_a_capture(captures, model):
    runner = Graphs()
    for lengths in [(17, 3, 9), (17,), (17, 3)]:
        run(runner, model, batch_for(model, lengths=lengths))
        model.heads.out[0] = torch.nn.Linear(64, 3)
    assert [key.bucket for key in runner._captured] == [Bucket(2, 32)]


@pytest.mark.parametrize("change", ["module", "storage"])
def test_stale_graph_is_not_replayed(captures, model, change):
    """A replay from weights whose memory was freed could end the CUDA context, even if its answers were dropped."""
    runner, batch = Graphs(), batch_for(model)
    run(runner, model, batch)
    ((key, captured),) = runner._captured.items()
    runner._captured[key] = dataclasses.replace(captured, replay=lambda: pytest.fail("a stale graph was replayed"))
    if change == "module":
        model.heads.out[0] = torch.nn.Linear(64, 3)
    else:
        storage = model.heads.out[0].weight.untyped_storage()
        storage.resize_(storage.nbytes() + 64)  # moves the values to other memory
    assert_as_eager(run(runner, model, batch), model, batch)
    assert len(captures) == 2


@pytest.mark.parametrize("changes", [1, graphs.MAX_CAPTURES])
def test_weights_replaced_during_a_capture_are_captured_again(captures, model, monkeypatch, changes):
    makes, runner, batch = graphs.capture, Graphs(), batch_for(model)

    def capture(*arguments):
        captured = makes(*arguments)
        if len(captures) <= changes:
            model.heads.out[0] = torch.nn.Linear(64, 3)
        return captured

    monkeypatch.setattr(graphs, "capture", capture)
    if changes < graphs.MAX_CAPTURES:
        assert_as_eager(run(runner, model, batch), model, batch)
        assert len(captures) == changes + 1
    else:
        with pytest.raises(CaptureError, match="the weights changed during each of 3 captures"):
            run(runner, model, batch)
        assert_as_eager(run(runner, model, batch), model, batch)


def test_replaced_graph_is_freed_before_the_next_capture(captures, model, monkeypatch):
    makes, runner, batch, alive = graphs.capture, Graphs(), batch_for(model), []
    run(runner, model, batch)
    loop = weakref.ref(next(iter(runner._captured.values())).loop)

    def capture(*arguments):
        gc.collect()
        alive.append(loop())
        return makes(*arguments)

    monkeypatch.setattr(graphs, "capture", capture)
    model.heads.out[0] = torch.nn.Linear(64, 3)
    run(runner, model, batch)
    assert alive == [None]


def test_train_mode_drops_the_graphs(captures, model):
    """Optimizers may write through `weight.data`, which is not detected."""
    run(model.execution.graphs, model, batch_for(model))
    model.train().eval()
    assert not model.execution.graphs._captured


def test_model_refuses_to_run_in_a_capture(captures, model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"data-dependent; capture model\.fixed_depth\(\) instead"):
        run_graph(model, batch_for(model)["input_ids"])


def test_copies_start_without_graphs(model):
    model.execution.graphs._refused["key"] = "a reason"
    assert (
        copy.deepcopy(model).execution.graphs._refused
        == {}
        == pickle.loads(pickle.dumps(model.execution.graphs))._refused
    )
