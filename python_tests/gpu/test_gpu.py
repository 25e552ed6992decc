"""The graph engine on a GPU, and the same tests on the CPU with CUDA replaced, which show that the tests run."""

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
from support.leaving_models import LENGTHS, prepared, tuned
from support.models import FAMILIES, batch_for, early_exit, varied_entropy

from benchmarks.end_to_end.engines import ENGINES, GRAPH
from benchmarks.gpu import replays
from earlyexit_kernels.criteria import RULES, Entropy
from earlyexit_kernels.engine import capturing, graphs, resident_postnorm
from earlyexit_kernels.engine.inputs import Inputs
from earlyexit_kernels.engine.resident import ResidentLoop, resident_unsupported_reason

ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HALF, BFLOAT16 = torch.float16, torch.bfloat16
#: Largest distance of logits from the eager engine in the same dtype, and share of rows whose exit may differ.
TOLERANCES = {torch.float32: (1e-4, 0.0), HALF: (3e-2, 0.2), BFLOAT16: (2e-1, 0.4)}
#: Criteria that the loop supports.
SUPPORTED = [name for name in RULES if name != "sampled_exit"]


@dataclass(frozen=True)
class Place:
    """Device that a test runs on."""

    device: str

    @property
    def is_gpu(self) -> bool:
        return self.device == "cuda"

    def on_graph(self, model, *, strict=True):
        """Set the graph engine; a strict one raises instead of falling back."""
        if strict:
            ENGINES[GRAPH](model)
        elif self.is_gpu:
            model.set_engine("graph")
        else:
            falls_back_on_cpu(model)
        return model

    def moved(self, model, batch, dtype=torch.float32):
        """Return copies of a model, under the eager and the graph engine, and of a batch."""
        both = [copy.deepcopy(model).to(self.device, dtype) for _ in range(2)]
        both[0].set_engine("eager")
        return both[0], self.on_graph(both[1]), {name: x.to(self.device) for name, x in batch.items()}

    @contextlib.contextmanager
    def broken(self, error):
        """Every capture fails: on a GPU an op raises in the middle of it."""
        with pytest.MonkeyPatch.context() as patch:
            if not self.is_gpu:
                patch.setattr(graphs, "capture", functools.partial(_raise, error))
            op, calls = resident_postnorm.rows_add_norm, []

            def fails(*arguments, **how):
                calls.append(torch.cuda.is_current_stream_capturing())
                if sum(calls) == 3:
                    raise error
                return op(*arguments, **how)

            patch.setattr(resident_postnorm, "rows_add_norm", fails)
            yield


def _raise(error, *_):
    raise error


@pytest.fixture(params=[pytest.param("cuda", marks=ON_GPU), "cpu"])
def place(request) -> Place:
    if request.param == "cpu":
        request.getfixturevalue("gpu")
    return Place(request.param)


def ready(family="bert", rule="entropy", pooling="first"):
    """Return a model under a criterion by which its rows leave at many exits, and a batch."""
    model, batch, _ = prepared(family, pooling, len(LENGTHS))
    model = copy.deepcopy(model)
    model.set_criterion(tuned(family, pooling, len(LENGTHS), rule))
    return model, batch


def assert_agree(got, expected, dtype=torch.float32) -> None:
    tolerance, share = TOLERANCES[dtype]
    same = got.exit_layer.cpu() == expected.exit_layer.cpu()
    assert (~same).float().mean() <= share
    assert (got.logits.cpu() - expected.logits.cpu())[same].abs().max() <= tolerance


@pytest.mark.parametrize("family", (*FAMILIES, "modernbert"))
def test_every_family_agrees_with_eager_and_cpu(place, family):
    model, batch = ready(family)
    expected = model(**batch)
    eager, graph, batch = place.moved(model, batch)
    got = graph(**batch)
    assert len(got.exit_layer.unique()) > 2
    assert_agree(got, eager(**batch))
    assert_agree(got, expected)


@pytest.mark.sample(6)
@pytest.mark.parametrize("pooling", [None, "first"])
@pytest.mark.parametrize("rule", SUPPORTED)
def test_every_supported_criterion(place, rule, pooling):
    model, batch = ready("bert", rule, pooling=pooling)
    assert resident_unsupported_reason(model.view(), torch.float32) is None
    expected = model(**batch)
    eager, graph, batch = place.moved(model, batch)
    for _ in range(2):
        assert_agree(graph(**batch), eager(**batch))
    assert_agree(graph(**batch), expected)


@pytest.mark.parametrize("family, built", [("bert", {"pooling": "mean"}), ("albert", {"num_hidden_groups": 1})])
def test_mean_pooling_and_shared_layers(place, family, built):
    model = early_exit(family, **{"pooling": "first", **built})
    batch = batch_for(model, "left" if "pooling" in built else "right", lengths=LENGTHS)
    model.set_criterion(varied_entropy(model.trace(**batch)))
    expected = model(**batch)
    eager, graph, batch = place.moved(model, batch)
    assert_agree(graph(**batch), eager(**batch))
    assert_agree(graph(**batch), expected)


@pytest.mark.parametrize(("pooling", "head"), [("mean", "cls"), (None, "cls"), (None, "mean")])
@pytest.mark.parametrize("kind", ["right", "holes"])
def test_prenorm_layers_with_holes_and_positions(place, kind, pooling, head):
    model = early_exit("modernbert", pooling=pooling, classifier_pooling=head)
    batch = batch_for(model, kind, lengths=LENGTHS)
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).flip(0)[None]
    model.set_criterion(varied_entropy(model.trace(**batch)))
    expected = model(**batch)
    eager, graph, batch = place.moved(model, batch)
    assert_agree(graph(**batch), eager(**batch))
    assert_agree(graph(**batch), expected)


@pytest.mark.parametrize("family, rule", [("bert", "full_depth"), ("bert", "entropy"), ("modernbert", "entropy")])
@pytest.mark.parametrize("dtype", [HALF, BFLOAT16])
def test_half_precision(place, dtype, family, rule):
    model, batch = ready(family, rule)
    eager, graph, batch = place.moved(model, batch, dtype)
    assert_agree(graph(**batch), eager(**batch), dtype)


#: Besides the plain case: embeddings narrower than the layers, and exits on the library's products.
BITS = [("bert", "entropy", dtype) for dtype in TOLERANCES] + [
    ("albert", "entropy", HALF),
    ("bert", "q_exit", torch.float32),
    ("modernbert", "entropy", HALF),
]


@pytest.mark.sample(4)
@pytest.mark.parametrize(("family", "rule", "dtype"), BITS)
def test_row_has_equal_bits_alone_and_in_batches(place, family, rule, dtype):
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
            if place.is_gpu:  # on the CPU the rounding of products depends on the number of rows
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


@pytest.mark.parametrize("nodes", ["torch", "none"])
def test_exits_in_triton(place, nodes, monkeypatch):
    """As in a build without the extension: with the IF nodes of torch where it has them, and in a plain graph."""
    if nodes == "none":
        monkeypatch.setattr(capturing, "TORCH_CALLS", ("no_such_call",))
    model, batch = ready()
    eager, graph, batch = place.moved(model, batch)
    if place.is_gpu:
        graph.set_backend("triton")
    assert graph.explain(**batch).nodes is None or graph.explain(**batch).nodes.name in (nodes, "none")
    for _ in range(2):
        assert_agree(graph(**batch), eager(**batch))


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("error", [RuntimeError("an op broke"), torch.OutOfMemoryError("CUDA out of memory\nmore")])
def test_failed_capture_falls_back_and_is_logged(place, error, backend, caplog):
    model, batch = ready()
    eager, _, batch = place.moved(model, batch)
    graph = place.on_graph(copy.deepcopy(eager), strict=False)
    if place.is_gpu:
        graph.set_backend(backend)
    expected = eager(**batch)
    with place.broken(error), caplog.at_level(logging.WARNING, "earlyexit_kernels"):
        for _ in range(2):
            assert_agree(graph(**batch), expected)
    (record,) = [record for record in caplog.records if record.message.startswith("engine")]
    assert "fell back to 'eager': capturing Bucket(" in record.message
    assert str(error).split("\n")[0] in record.message
    assert record.exc_info and record.exc_info[1] is error, "with the traceback of the error"
    assert not graph.execution.graphs._captured and graph.execution.graphs._refused
    if place.is_gpu:
        assert not torch.cuda.is_current_stream_capturing()
        graph.set_engine("graph")
    else:
        graph.execution.graphs.forget()
    assert_agree(graph(**batch), expected)
    assert graph.execution.graphs._captured


def test_batch_larger_than_the_largest_bucket(place, monkeypatch):
    model, batch = ready()
    eager, graph, batch = place.moved(model, batch)
    monkeypatch.setattr(graphs, "MAX_TOKENS", 4 * 32)
    batch = {name: x[:13] for name, x in batch.items()}
    assert_agree(graph(**batch), eager(**batch))
    assert {key[0].rows for key in graph.execution.graphs._captured} == {1, 4}


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_stale_buffers_do_not_affect_answers(place, family):
    model, batch = ready(family)
    _, graph, batch = place.moved(model, batch)
    expected = graph(**batch)
    for rows in (len(LENGTHS), 9):
        for captured in graph.execution.graphs._captured.values():
            loop: ResidentLoop = captured.loop
            for buffer in (*loop.activations.buffers, loop.answers):
                buffer.fill_(torch.nan)
        out = graph(**{name: x[:rows] for name, x in batch.items()})
        assert torch.equal(out.logits, expected.logits[:rows])
        assert torch.equal(out.exit_layer, expected.exit_layer[:rows])


def test_thousand_batches_of_random_sizes(place, monkeypatch):
    if not place.is_gpu:
        monkeypatch.setattr(replays, "EVERY", 2)
    with torch.inference_mode():
        checked, wrong = replays.replay(1000 if place.is_gpu else 4)
    assert wrong == [] and checked >= 3


def test_call_inside_a_capture_is_refused_with_advice(place, monkeypatch):
    model, batch = ready()
    eager, graph, batch = place.moved(model, batch)
    graph(**batch), eager(**batch)
    capturing = contextlib.nullcontext()
    if place.is_gpu:
        capturing = torch.cuda.graph(torch.cuda.CUDAGraph())
    else:
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with capturing:
        for each in (eager, graph):
            with pytest.raises(RuntimeError, match=r"capture model\.fixed_depth\(\) instead"):
                each(**batch) if place.is_gpu else each.execution.run_graph(each.view(), Inputs(batch["input_ids"]))
    if place.is_gpu:
        assert_agree(graph(**batch), eager(**batch))


def test_unsupported_model_falls_back(place, caplog):
    model, batch = ready("bert", "sampled_exit")
    eager, _, batch = place.moved(model, batch)
    expected = eager(**batch)
    assert "draws by a row's tokens" in resident_unsupported_reason(model.view(), torch.float32)
    if place.is_gpu:
        graph = place.on_graph(copy.deepcopy(eager), strict=False)
        with caplog.at_level(logging.WARNING, "earlyexit_kernels"):
            assert_agree(graph(**batch), expected)
        assert "draws by a row's tokens" in caplog.text
        assert "draws by a row's tokens" in str(graph.explain(**batch))


def test_changed_weights_are_detected(place):
    model, batch = ready("bert", "full_depth")
    eager, graph, batch = place.moved(model, batch)
    before = graph(**batch).logits
    for each in (eager, graph):
        with torch.no_grad():
            if place.is_gpu:  # a capture that does not wait for queued work copies the old weights
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


def test_model_moved_away_and_back(place):
    """The old graphs refer to memory that has been freed or reused."""
    model, batch = ready()
    eager, graph, batch = place.moved(model, batch)
    expected = eager(**batch)
    assert_agree(graph(**batch), expected)
    graph.double().to("cpu")
    torch.cuda.empty_cache()
    graph.to(place.device).float()
    for _ in range(2):
        assert_agree(graph(**batch), expected)


def test_capture_in_inference_mode_works_outside_of_it(place):
    model, batch = ready()
    eager, graph, batch = place.moved(model, batch)
    expected = eager(**batch)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            assert_agree(graph(**batch), expected)


def test_fixed_depth_in_a_graph_of_the_caller(place):
    """The caller copies the input in; without a GPU the call replaces the replay."""
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
