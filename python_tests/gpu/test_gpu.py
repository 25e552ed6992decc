"""Captured layers on a GPU, and the same tests on the CPU with CUDA graphs replaced, which show that the tests run."""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.leaving_models import LENGTHS, prepared, tuned
from support.models import ALL_FAMILIES, batch_for, early_exit, varied_entropy
from torch import nn

from earlyexit_kernels.core import attention, loop
from earlyexit_kernels.criteria import RULES, Entropy
from earlyexit_kernels.cuda import captured
from earlyexit_kernels.hf import runner

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
HALF, BFLOAT16 = torch.float16, torch.bfloat16
#: Largest distance of logits from the family's layers in the same dtype, and share of rows whose exit may differ.
TOLERANCES = {torch.float32: (1e-4, 0.0), HALF: (3e-2, 0.2), BFLOAT16: (2e-1, 0.4)}
#: Batches until all levels that one reaches have been captured.
BATCHES = 4


@dataclass(frozen=True)
class Place:
    """Device that a test runs on; `replays` replaces CUDA graphs on the CPU."""

    device: str
    replays: Any = None

    def moved(self, model, batch, dtype=torch.float32):
        """Return copies of a model, with the family's layers and with captured ones, and of a batch."""
        both = [copy.deepcopy(model).to(self.device, dtype) for _ in range(2)]
        for each, layers in zip(both, ("eager", "captured"), strict=True):
            each.configure(path=layers)
        return *both, {name: x.to(self.device) for name, x in batch.items()}

    @contextlib.contextmanager
    def failing(self, how):
        """Every capture fails in its middle: by an exception, or since the host asks the device for a number."""
        error = how if isinstance(how, Exception) else RuntimeError("operation not permitted")
        with pytest.MonkeyPatch.context() as patch:
            if self.replays is not None:
                patch.setattr(self.replays, "error", error)
            attend = attention._varlen

            def fails(q, *arguments, **options):
                if self.replays is None and torch.cuda.is_current_stream_capturing():
                    if isinstance(how, Exception):
                        raise how
                    q.sum().item()
                return attend(q, *arguments, **options)

            patch.setattr(attention, "_varlen", fails)
            yield


@pytest.fixture(params=[pytest.param("cuda", marks=ON_GPU), "cpu"])
def place(request, monkeypatch) -> Place:
    for device in ("cpu", "cuda"):  # rows move to every smaller level
        monkeypatch.setitem(loop.COMPACTION_COSTS, device, loop.CompactionCost(0, 0))
    return Place(request.param, request.getfixturevalue("replays") if request.param == "cpu" else None)


def ready(family="bert", rule="entropy", pooling="first"):
    """Return a model under a criterion by which its rows leave at many exits, and a batch."""
    model, batch, _ = prepared(family, pooling, len(LENGTHS))
    model = copy.deepcopy(model)
    model.set_criterion(tuned(family, pooling, len(LENGTHS), rule))
    return model, batch


def levels_of(model):
    return list(model.runner.paths["captured"].layers._levels.values())


def assert_captured(model) -> None:
    levels = levels_of(model)
    assert levels and not [level.refused for level in levels if level.refused]
    assert any(level.captured for level in levels)


def assert_agree(got, expected, dtype=torch.float32) -> None:
    tolerance, share = TOLERANCES[dtype]
    same = got.exit_layer.cpu() == expected.exit_layer.cpu()
    assert (~same).float().mean() <= share
    assert (got.logits.cpu() - expected.logits.cpu())[same].abs().max() <= tolerance


def check(place, model, batch, dtype=torch.float32):
    """Compare captured layers with the family's, batch after batch, and in float32 with the CPU."""
    expected = model(**batch) if dtype == torch.float32 else None
    family, graph, batch = place.moved(model, batch, dtype)
    on_place = family(**batch)
    for _ in range(BATCHES):
        assert_agree(graph(**batch), on_place, dtype)
        if expected is not None:
            assert_agree(graph(**batch), expected)
    assert_captured(graph)
    return graph, batch, on_place


@pytest.mark.sample(4)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_family(place, family):
    model = early_exit(family)
    batch = batch_for(model, lengths=LENGTHS)
    model.set_criterion(varied_entropy(model.trace(**batch)))
    _, _, out = check(place, model, batch)
    assert len(out.exit_layer.unique()) > 1


@pytest.mark.sample(6)
@pytest.mark.parametrize("pooling", [None, "first"])
@pytest.mark.parametrize("rule", RULES)
def test_every_criterion(place, rule, pooling):
    check(place, *ready("bert", rule, pooling=pooling))


#: Family, pooling, sizes, kind of batch, and whether positions run backwards.
OTHERS = [("bert", "mean", {}, "left", False), ("albert", "first", {"num_hidden_groups": 1}, "right", False)]
OTHERS += [("modernbert", "mean", {}, kind, True) for kind in ("right", "holes")]


@pytest.mark.parametrize("family, pooling, sizes, kind, backwards", OTHERS)
def test_mean_pooling_shared_layers_holes_and_positions(place, family, pooling, sizes, kind, backwards):
    model = early_exit(family, pooling=pooling, **sizes)
    batch = batch_for(model, kind, lengths=LENGTHS)
    if backwards:
        batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).flip(0)[None]
    model.set_criterion(varied_entropy(model.trace(**batch)))
    check(place, model, batch)


@pytest.mark.parametrize("family, rule", [("bert", "full_depth"), ("bert", "entropy"), ("modernbert", "entropy")])
@pytest.mark.parametrize("dtype", [HALF, BFLOAT16])
def test_half_precision(place, dtype, family, rule):
    check(place, *ready(family, rule), dtype)


@pytest.mark.sample(2)
@pytest.mark.parametrize("family", ["bert", "modernbert", "llama"])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_rows_alone_and_in_batches_agree_up_to_rounding(place, dtype, family):
    model = early_exit(family)
    lengths = [1 + 7 * row % 40 for row in range(32)]
    batch = batch_for(model, lengths=lengths)
    model.set_criterion(varied_entropy(model.trace(**batch)))
    _, graph, batch = place.moved(model, batch, dtype)
    together = graph(**batch)
    for size in (1, 8, 32):
        parts = [graph(**{name: x[i : i + size] for name, x in batch.items()}) for i in range(0, 32, size)]
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in ("logits", "exit_layer")}
        assert_agree(SimpleNamespace(**joined), together, dtype)


@pytest.mark.parametrize("family", ["bert", "modernbert", "deberta"])
def test_stale_nan_in_tokens_of_no_row(place, family):
    graph, batch, expected = check(place, *ready(family))
    for rows in (len(LENGTHS), 9, 1):
        for level in levels_of(graph):
            level.hidden.fill_(torch.nan)
        torch.full((2**22,), torch.nan, device=place.device)  # freed at once, then reused
        out = graph(**{name: x[:rows] for name, x in batch.items()})
        assert torch.equal(out.exit_layer, expected.exit_layer[:rows])
        assert (out.logits - expected.logits[:rows]).abs().max() <= TOLERANCES[torch.float32][0]


def test_levels_share_their_pool_in_any_order(place):
    """A replay at one level writes into memory that captures of the others use."""
    graph, batch, expected = check(place, *ready("modernbert"))
    for number in range(40):
        rows = slice(0, 1 + 5 * number % len(LENGTHS))
        out = graph(**{name: x[rows] for name, x in batch.items()})
        assert torch.equal(out.exit_layer, expected.exit_layer[rows])
    assert len(levels_of(graph)) > 2
    assert_captured(graph)


def random_batches(graph, batch, expected, count, seed) -> list[bool]:
    """Run random rows of a batch, and return for each whether its answers are as expected."""
    generator, same = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        rows = torch.randperm(len(LENGTHS), generator=generator)
        rows = rows[: int(torch.randint(1, len(LENGTHS) + 1, (1,), generator=generator))].to(expected.logits.device)
        out = graph(**{name: x[rows] for name, x in batch.items()})
        close = (out.logits - expected.logits[rows]).abs().max() <= TOLERANCES[torch.float32][0]
        same.append(bool(torch.equal(out.exit_layer, expected.exit_layer[rows]) and close))
    return same


def test_thousand_batches_of_random_sizes(place):
    graph, batch, expected = check(place, *ready())
    count = 1000 if place.device == "cuda" else 12
    assert random_batches(graph, batch, expected, count, 0) == [True] * count
    assert_captured(graph)


def test_two_threads_and_two_streams(place):
    model, batch = ready()
    family, graph, batch = place.moved(model, batch)
    expected, same = family(**batch), []

    def many(seed):
        on_gpu = place.device == "cuda"
        with torch.cuda.stream(torch.cuda.Stream()) if on_gpu else contextlib.nullcontext():
            same.extend(random_batches(graph, batch, expected, 40 if on_gpu else 5, seed))

    if place.device == "cuda":
        torch.cuda.synchronize()
    threads = [threading.Thread(target=many, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True] * (80 if place.device == "cuda" else 10)


def test_changed_weights(place):
    """In place without a capture; replaced weights are captured again."""
    graph, batch, before = check(place, *ready("bert", "full_depth"))
    dense = graph.backbone.encoder.layer[1].output.dense
    if place.device == "cuda":  # the replays wait for queued work
        torch.cuda._sleep(10**8)
    with torch.no_grad():
        dense.weight.mul_(2.0)
    after = graph(**batch)
    assert (after.logits - before.logits).abs().max() > 1e-3
    for _ in range(BATCHES):
        dense.weight = nn.Parameter(dense.weight.detach().clone())
        assert_agree(graph(**batch), after)
    graph.configure(path="eager")
    assert_agree(graph(**batch), after)
    graph.configure(path="captured")
    graph.set_criterion(Entropy(threshold=5.0))
    assert graph(**batch).exit_layer.tolist() == [1] * len(LENGTHS)


def test_model_moved_away_and_back(place):
    """The old graphs refer to memory that has been freed or reused."""
    graph, batch, expected = check(place, *ready())
    graph.configure(path="auto")
    graph.double().to("cpu")
    torch.cuda.empty_cache()
    graph.to(place.device).float()
    for _ in range(BATCHES):
        assert_agree(graph(**batch), expected)
    assert_captured(graph)


@pytest.mark.parametrize("family, pooling", [("bert", "first"), ("llama", "last")])
def test_dropped_captures_are_made_again(place, family, pooling):
    """The memory pool outlives the last capture in it."""
    graph, batch, expected = check(place, *ready(family, pooling=pooling))
    for level in levels_of(graph):
        level.forget()
    for _ in range(BATCHES):
        assert_agree(graph(**batch), expected)
    assert_captured(graph)


def test_capture_in_inference_mode_works_outside_of_it(place):
    model, batch = ready()
    family, graph, batch = place.moved(model, batch)
    expected = family(**batch)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            for _ in range(2):
                assert_agree(graph(**batch), expected)
    assert_captured(graph)


def test_parts_are_the_answers_of_forward(place):
    graph, batch, expected = check(place, *ready())
    parts = list(graph.stream(**batch))
    rows = torch.cat([part.rows for part in parts])
    assert rows.sort().values.tolist() == list(range(len(LENGTHS))) and len(parts) > 1
    assert torch.equal(torch.cat([part.exit_layer for part in parts]), expected.exit_layer[rows])


@pytest.mark.parametrize(
    "how", [ValueError("an op broke"), torch.OutOfMemoryError("CUDA out of memory"), "waits"], ids=str
)
def test_failed_capture_is_said_and_answered(place, how, caplog, monkeypatch):
    model, batch = ready()
    family, graph, batch = place.moved(model, batch)
    expected, now = family(**batch), [0.0]
    monkeypatch.setattr(captured.time, "monotonic", lambda: now[0])
    stream = torch.cuda.current_stream() if place.device == "cuda" else None
    with place.failing(how), caplog.at_level(logging.WARNING, "earlyexit_kernels"):
        for _ in range(BATCHES):
            assert_agree(graph(**batch), expected)
    assert bool(levels_of(graph)) is not isinstance(how, torch.OutOfMemoryError), "without memory all are dropped"
    said = [record for record in caplog.records if "cannot be captured" in record.getMessage()]
    assert len(said) == 1 and said[0].exc_info
    if place.device == "cuda":
        assert not torch.cuda.is_current_stream_capturing() and torch.cuda.current_stream() == stream
    now[0] = captured.RETRY_SECONDS + 1
    if not isinstance(how, torch.OutOfMemoryError):
        graph.refresh()
    for _ in range(BATCHES):
        assert_agree(graph(**batch), expected)
    assert_captured(graph)


def test_other_levels_are_captured_after_a_failure(place):
    graph, batch, expected = check(place, *ready())
    one = {name: x[:1] for name, x in batch.items()}
    graph.refresh()
    with place.failing("waits"):
        for _ in range(BATCHES):
            graph(**one)
    assert any(level.refused for level in levels_of(graph))
    for _ in range(BATCHES):
        assert_agree(graph(**batch), expected)
    assert any(level.captured for level in levels_of(graph))


def test_call_inside_a_capture_is_refused_with_advice(place, monkeypatch):
    refused = pytest.raises(RuntimeError, match=r"model\.fixed_depth\(\) instead")
    if place.device == "cpu":
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with refused:
            runner.Runner()._begin(SimpleNamespace(device=torch.device("cuda")), None)
        return
    graph, batch, expected = check(place, *ready())
    with torch.cuda.graph(torch.cuda.CUDAGraph()), refused:
        graph(**batch)
    assert_agree(graph(**batch), expected)


def test_fixed_depth_in_a_graph_of_the_caller(place):
    """The caller copies the input in; without a GPU the call replaces the replay."""
    model, batch = ready()
    family, _, batch = place.moved(model, batch)
    fixed, inputs = family.fixed_depth(), {name: x.flip(0).contiguous() for name, x in batch.items()}
    expected, graph = family(**batch), None
    with torch.no_grad():
        if place.device == "cuda":
            side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
            with torch.cuda.stream(side):
                fixed(**inputs)
            side.synchronize()
            with torch.cuda.graph(graph):
                out = fixed(**inputs)
        for name, x in inputs.items():
            x.copy_(batch[name])
        if graph is None:
            out = fixed(**inputs)
        else:
            graph.replay()
    logits, exit_layer = out
    assert torch.equal(exit_layer, expected.exit_layer)
    assert (logits - expected.logits).abs().max() <= 1e-4
