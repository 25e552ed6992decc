"""The graph engine on a GPU; and the same tests on the CPU with a stand-in, so that they are known to run."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import threading
from dataclasses import dataclass

import pytest
import torch
from support.fake_gpu import falls_back_on_cpu
from support.leaving_models import LENGTHS, SETTINGS, prepared, tuned
from support.models import FAMILIES, batch_for, early_exit, varied_entropy

from benchmarks.end_to_end.engines import ENGINES, GRAPH
from benchmarks.gpu import replays
from earlyexit_kernels.criteria import Entropy
from earlyexit_kernels.engine import graphs, resident
from earlyexit_kernels.engine.resident import ResidentLoop, why_not_resident

ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HALF, BFLOAT16 = torch.float16, torch.bfloat16
#: Of logits against those of the eager engine in the same dtype, and of the share of rows that may leave elsewhere.
TOLERANCES = {torch.float32: (1e-4, 0.0), HALF: (3e-2, 0.2), BFLOAT16: (2e-1, 0.4)}
#: Rules that the loop holds.
HELD = [name for name in SETTINGS if name != "sampled_exit"]


@dataclass(frozen=True)
class Place:
    """Where a test runs."""

    device: str

    @property
    def is_gpu(self) -> bool:
        return self.device == "cuda"

    def on_graph(self, model, *, strict=True):
        """Under the graph engine; a strict one raises where it would fall back."""
        if strict:
            ENGINES[GRAPH](model)
        elif self.is_gpu:
            model.set_engine("graph")
        else:
            falls_back_on_cpu(model)
        return model

    def moved(self, model, batch, dtype=torch.float32):
        """Copies of a model, under the eager and the graph engine, and of a batch."""
        both = [copy.deepcopy(model).to(self.device, dtype) for _ in range(2)]
        both[0].set_engine("eager")
        return both[0], self.on_graph(both[1]), {name: x.to(self.device) for name, x in batch.items()}

    @contextlib.contextmanager
    def broken(self, error):
        """No capture comes to its end: on a GPU an op raises in the middle of it."""
        with pytest.MonkeyPatch.context() as patch:
            if not self.is_gpu:
                patch.setattr(graphs, "capture", functools.partial(_raise, error))
            op, calls = resident.rows_add_norm, []

            def fails(*arguments, **how):
                calls.append(torch.cuda.is_current_stream_capturing())
                if sum(calls) == 3:
                    raise error
                return op(*arguments, **how)

            patch.setattr(resident, "rows_add_norm", fails)
            yield


def _raise(error, *_):
    raise error


@pytest.fixture(params=[pytest.param("cuda", marks=ON_GPU), "cpu"])
def place(request) -> Place:
    if request.param == "cpu":
        request.getfixturevalue("gpu")
    return Place(request.param)


def ready(family="bert", rule="entropy", pooling="first"):
    """A model under a rule by which its rows leave at many exits, and a batch."""
    model, batch, _ = prepared(family, pooling, len(LENGTHS))
    model = copy.deepcopy(model)
    model.set_criterion(tuned(family, pooling, len(LENGTHS), rule))
    return model, batch


def assert_agree(got, expected, dtype=torch.float32) -> None:
    tolerance, share = TOLERANCES[dtype]
    same = got.exit_layer.cpu() == expected.exit_layer.cpu()
    assert (~same).float().mean() <= share
    assert (got.logits.cpu() - expected.logits.cpu())[same].abs().max() <= tolerance


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_as_eagerly_and_as_on_the_cpu(place, family):
    model, batch = ready(family)
    expected = model(**batch)
    eager, graph, batch = place.moved(model, batch)
    got = graph(**batch)
    assert len(got.exit_layer.unique()) > 2
    assert_agree(got, eager(**batch))
    assert_agree(got, expected)


@pytest.mark.parametrize("pooling", [None, "first"])
@pytest.mark.parametrize("rule", HELD)
def test_every_rule_it_holds(place, rule, pooling):
    model, batch = ready("bert", rule, pooling=pooling)
    assert why_not_resident(model.parts, torch.float32) == ""
    expected = model(**batch)
    eager, graph, batch = place.moved(model, batch)
    for _ in range(2):
        assert_agree(graph(**batch), eager(**batch))
    assert_agree(graph(**batch), expected)


@pytest.mark.parametrize("family, built", [("bert", {"pooling": "mean"}), ("albert", {"num_hidden_groups": 1})])
def test_mean_pooling_and_layers_that_are_one(place, family, built):
    model = early_exit(family, **{"pooling": "first", **built})
    batch = batch_for(model, "left" if "pooling" in built else "right", lengths=LENGTHS)
    model.set_criterion(varied_entropy(model.trace(**batch)))
    expected = model(**batch)
    eager, graph, batch = place.moved(model, batch)
    assert_agree(graph(**batch), eager(**batch))
    assert_agree(graph(**batch), expected)


@pytest.mark.parametrize("rule", ["full_depth", "entropy"])
@pytest.mark.parametrize("dtype", [HALF, BFLOAT16])
def test_half_precision(place, dtype, rule):
    model, batch = ready("bert", rule)
    eager, graph, batch = place.moved(model, batch, dtype)
    assert_agree(graph(**batch), eager(**batch), dtype)


#: Beside the plain case: embeddings narrower than the layers, and exits that the library's products serve.
BITS = [("bert", "entropy", dtype) for dtype in TOLERANCES] + [
    ("albert", "entropy", HALF),
    ("bert", "q_exit", torch.float32),
]


@pytest.mark.parametrize(("family", "rule", "dtype"), BITS)
def test_a_row_has_the_same_bits_alone_and_among_others(place, family, rule, dtype):
    model, _ = ready(family, rule)
    lengths = [1 + 7 * row % 40 for row in range(128)]
    batch = batch_for(model, lengths=lengths)
    _, graph, batch = place.moved(model, batch, dtype)
    together = graph(**batch)
    assert len(together.exit_layer.unique()) > 1
    for size in (1, 8, 32):
        for start in range(0, 128, size)[:: 8 if size == 1 else 1]:
            rows = slice(start, start + size)
            part = graph(**{name: x[rows] for name, x in batch.items()})
            if place.is_gpu:  # on the CPU products round with their row count
                assert torch.equal(part.exit_layer, together.exit_layer[rows])
                assert torch.equal(part.logits.view(torch.int32), together.logits[rows].view(torch.int32))
    trimmed = graph(**{name: x[5:6, : lengths[5]] for name, x in batch.items()})
    assert not place.is_gpu or torch.equal(trimmed.logits, together.logits[5:6]), "in a bucket of another length"


def test_two_threads_and_two_streams(place):
    model, batch = ready()
    eager, graph, batch = place.moved(model, batch)
    expected, found = eager(**batch), []

    def many(seed):
        generator = torch.Generator().manual_seed(seed)
        with torch.cuda.stream(torch.cuda.Stream()):
            for k in range(20):
                rows = torch.randperm(len(LENGTHS), generator=generator)[: 1 + seed + k % 7].to(place.device)
                out = graph(**{name: x[rows] for name, x in batch.items()})
                close = (out.logits - expected.logits[rows]).abs().max() <= 1e-4
                found.append(bool(torch.equal(out.exit_layer, expected.exit_layer[rows]) and close))

    torch.cuda.synchronize()
    threads = [threading.Thread(target=many, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 40


@pytest.mark.parametrize("error", [RuntimeError("an op broke"), torch.OutOfMemoryError("CUDA out of memory\nmore")])
def test_a_capture_that_fails_is_unwound_and_said(place, error, caplog):
    model, batch = ready()
    eager, _, batch = place.moved(model, batch)
    graph = place.on_graph(copy.deepcopy(eager), strict=False)
    expected = eager(**batch)
    with place.broken(error), caplog.at_level(logging.WARNING, "earlyexit_kernels"):
        for _ in range(2):
            assert_agree(graph(**batch), expected)
    (said,) = [message for message in caplog.messages if message.startswith("engine")]
    assert "fell back to 'eager': capturing Bucket(" in said
    assert str(error).split("\n")[0] in said
    assert not graph._graphs._captured and graph._graphs._refused
    if place.is_gpu:
        assert not torch.cuda.is_current_stream_capturing()
        graph.set_engine("graph")
    else:
        graph._graphs.forget()
    assert_agree(graph(**batch), expected)
    assert graph._graphs._captured


def test_a_batch_larger_than_the_largest_bucket(place, monkeypatch):
    model, batch = ready()
    eager, graph, batch = place.moved(model, batch)
    monkeypatch.setattr(graphs, "MOST_TOKENS", 4 * 32)
    batch = {name: x[:13] for name, x in batch.items()}
    assert_agree(graph(**batch), eager(**batch))
    assert {key[0].rows for key in graph._graphs._captured} == {1, 4}


def test_what_the_buffers_held_reaches_no_row(place):
    model, batch = ready()
    _, graph, batch = place.moved(model, batch)
    expected = graph(**batch)
    for rows in (len(LENGTHS), 9):
        for captured in graph._graphs._captured.values():
            loop: ResidentLoop = captured.loop
            for buffer in (loop.hidden, loop.qkv, loop.context, loop.middle, loop.inner, loop.features, loop.answers):
                buffer.fill_(torch.nan)
        out = graph(**{name: x[:rows] for name, x in batch.items()})
        assert torch.equal(out.logits, expected.logits[:rows])
        assert torch.equal(out.exit_layer, expected.exit_layer[:rows])


def test_a_thousand_batches_of_random_sizes(place, monkeypatch):
    if not place.is_gpu:
        monkeypatch.setattr(replays, "EVERY", 2)
    with torch.inference_mode():
        checked, wrong = replays.replay(1000 if place.is_gpu else 4)
    assert wrong == [] and checked >= 3


def test_a_capture_of_somebody_else_is_refused_with_the_cure(place, monkeypatch):
    model, batch = ready()
    eager, graph, batch = place.moved(model, batch)
    graph(**batch), eager(**batch)
    capturing = contextlib.nullcontext()
    if place.is_gpu:
        capturing = torch.cuda.graph(torch.cuda.CUDAGraph())
    else:
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        monkeypatch.setattr(type(graph), "device", torch.device("cuda"))
    with capturing:
        for each in (eager, graph):
            with pytest.raises(RuntimeError, match=r"capture model\.fixed_depth\(\) instead"):
                each(**batch) if place.is_gpu else each.from_graph(batch["input_ids"])
    if place.is_gpu:
        assert_agree(graph(**batch), eager(**batch))


def test_a_model_that_no_graph_holds_falls_back(place, caplog):
    model, batch = ready("bert", "sampled_exit")
    eager, _, batch = place.moved(model, batch)
    expected = eager(**batch)
    assert "draws by a row's tokens" in why_not_resident(model.parts, torch.float32)
    if place.is_gpu:
        graph = place.on_graph(copy.deepcopy(eager), strict=False)
        with caplog.at_level(logging.WARNING, "earlyexit_kernels"):
            assert_agree(graph(**batch), expected)
        assert "draws by a row's tokens" in caplog.text
        assert "draws by a row's tokens" in str(graph.explain(**batch))


def test_weights_that_change_are_seen(place):
    model, batch = ready("bert", "full_depth")
    eager, graph, batch = place.moved(model, batch)
    before = graph(**batch).logits
    for each in (eager, graph):
        with torch.no_grad():
            if place.is_gpu:  # a capture that doesn't wait for what is queued copies the weights of before
                torch.cuda._sleep(10**8)
            each.backbone.encoder.layer[1].output.dense.weight.mul_(2.0)
            each.backbone.encoder.layer[1].attention.self.value.weight.mul_(2.0)
    after = graph(**batch)
    assert_agree(after, eager(**batch))
    assert (after.logits - before).abs().max() > 1e-3
    for each in (eager, graph):
        each.set_criterion(Entropy(threshold=5.0))
    assert_agree(graph(**batch), eager(**batch))
    assert graph(**batch).exit_layer.tolist() == [1] * len(LENGTHS)


def test_a_model_that_went_and_came_back(place):
    """Its old graphs know addresses that hold something else by now, or nothing."""
    model, batch = ready()
    eager, graph, batch = place.moved(model, batch)
    expected = eager(**batch)
    assert_agree(graph(**batch), expected)
    graph.double().to("cpu")
    torch.cuda.empty_cache()
    graph.to(place.device).float()
    for _ in range(2):
        assert_agree(graph(**batch), expected)


def test_what_is_captured_in_inference_mode_serves_outside_of_it(place):
    model, batch = ready()
    eager, graph, batch = place.moved(model, batch)
    expected = eager(**batch)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            assert_agree(graph(**batch), expected)


def test_fixed_depth_is_captured_by_whoever_wants(place):
    """In a graph of one's own, whose input is copied in; without a GPU the call stands for the replay."""
    model, batch = ready()
    eager, _, batch = place.moved(model, batch)
    fixed, inputs = eager.fixed_depth(), {name: x.flip(0).contiguous() for name, x in batch.items()}
    expected = eager(**batch)
    with torch.no_grad():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            out = fixed(**inputs)
        side.synchronize()
        if place.is_gpu:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = fixed(**inputs)
        for name, x in inputs.items():
            x.copy_(batch[name])
        if place.is_gpu:
            graph.replay()
        else:
            out = fixed(**inputs)
    logits, exit_layer = out
    assert torch.equal(exit_layer, expected.exit_layer)
    assert (logits - expected.logits).abs().max() <= 1e-4
