"""Captured layers on the CPU, with a replacement for CUDA graphs: answers, sizes, changes and failures."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import threading
from types import SimpleNamespace

import pytest
import torch
from support.models import batch_for, early_exit, parameter_set, varied
from support.rule_models import model_for_rule
from torch import nn

import earlyexit_kernels as ee
from earlyexit_kernels.core import loop
from earlyexit_kernels.core.view import Settings
from earlyexit_kernels.cuda import captured
from earlyexit_kernels.cuda.level import Level
from earlyexit_kernels.ops import self_test


def levels_of(model) -> list:
    return list(model.runner.paths["captured"].layers._levels.values())


def agrees(out, expected, atol=2e-5):
    assert torch.equal(out.exit_layer, expected.exit_layer)
    assert torch.equal(out.layers_run, expected.layers_run)
    torch.testing.assert_close(out.logits, expected.logits, atol=atol, rtol=1e-4)


@pytest.fixture
def cheap(monkeypatch):
    """Costs with which 'auto' moves rows to every smaller level."""
    monkeypatch.setitem(loop.COMPACTION_COSTS, "cpu", loop.CompactionCost(0, 0))


def warm(family="bert", **settings):
    """A model whose layers have been captured, where the fixture `replays` lets them, and its batch."""
    model, batch = varied(family)
    model.configure(path="captured", **settings)
    for _ in range(3):
        model(**batch)
    return model, batch


def family_answers(model, batch):
    """The answers of the family's layers; captures are dropped."""
    model.configure(path="eager")
    expected = model(**batch)
    model.configure(path="captured")
    return expected


@pytest.mark.parametrize("family", ["bert", "modernbert", "deberta-v2"])
def test_every_batch_is_answered_as_by_the_family(family, replays, cheap):
    """The first batch runs eagerly, the second captures, later ones replay; a batch of another shape goes between."""
    model, batch = varied(family)
    other = batch_for(model, lengths=(3, 9, 2, 5))
    expected_other, expected = family_answers(model, other), family_answers(model, batch)
    captures = []
    for number in range(4):
        agrees(model(**batch), expected)
        if number < 2:
            agrees(model(**other), expected_other)
        captures.append(replays.captures)
    assert captures[-1] == captures[-2] >= model.depth and replays.replays > captures[-1]
    assert model.explain().path == "captured"


def test_a_model_in_another_dtype_has_levels_of_its_own(replays):
    model, batch = warm()
    model.to(torch.bfloat16)
    eager = copy.deepcopy(model)
    eager.configure(path="eager")
    expected, before = eager(**batch), replays.replays
    for _ in range(3):
        agrees(model(**batch), expected, atol=2e-2)
    assert replays.replays > before and model.explain().path == "captured"


def test_a_backbone_of_another_width_has_levels_of_its_own(replays):
    model, batch = warm()
    wide = early_exit(hidden_size=2 * model.backbone.config.hidden_size, criterion=model.criterion)
    model.backbone, model.heads = wide.backbone, wide.heads
    expected, before = wide(**batch), replays.replays
    for _ in range(3):
        agrees(model(**batch), expected)
    assert replays.replays > before and model.explain().path == "captured"


def test_fewer_rows_after_a_pass_that_was_left(replays):
    """Positions are found by the ids of the rows, and those of the pass before are not of this batch."""
    model, _ = varied("modernbert")
    more, fewer = (batch_for(model, lengths=lengths) for lengths in ([3] * 8, [5] * 5))
    expected = family_answers(model, fewer)
    for _ in range(3):
        model(**more)
    parts = model.stream(**more)
    next(parts)
    parts.close()
    before = replays.replays
    agrees(model(**fewer), expected)
    assert len(levels_of(model)) == 1 and replays.replays > before


@pytest.mark.parametrize(("rule", "family"), [("entropy", "modernbert"), ("skip_gate", "bert")])
def test_batches_with_holes_and_layers_that_some_rows_skip(rule, family, replays, cheap):
    model, batch = model_for_rule(rule, family)
    expected = family_answers(model, batch)
    for compaction in ("auto", "always", "never"):
        model.configure(compaction=compaction)
        for _ in range(3):
            agrees(model(**batch), expected)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
def test_nothing_is_recorded_for_gradients(mode, replays):
    """Buffers that record what was written to them would hold every layer of every batch."""
    model, batch = warm()
    with mode():
        out = model(**batch)
    assert levels_of(model) and replays.replays
    buffers = [x for level in levels_of(model) for x in (level.hidden, level.offsets, level.row_ids)]
    assert not any(x.requires_grad or x.is_inference() for x in buffers) and not out.logits.requires_grad


def early_answers(model, batch):
    """The answers of the family's layers, with captures kept."""
    kept, model.settings = model.settings, Settings(path="eager")
    expected = model(**batch)
    model.settings = kept
    return expected


def replace_weight(model):
    dense = model.backbone.encoder.layer[1].output.dense
    dense.weight = nn.Parameter(dense.weight.detach() * 1.5)


def replace_layer(model):
    model.backbone.encoder.layer[1] = copy.deepcopy(model.backbone.encoder.layer[2])


def add_hook(model):
    model.backbone.encoder.layer[1].register_forward_hook(lambda module, given, out: out * 1.1)


@pytest.mark.parametrize("change", [replace_weight, replace_layer, add_hook])
def test_layers_changed_otherwise_are_captured_again_or_run_eagerly(change, replays):
    model, batch = warm()
    before = replays.captures
    change(model)
    expected = early_answers(model, batch)
    for _ in range(3):
        agrees(model(**batch), expected)
    assert replays.captures == before + (change is not add_hook)


@pytest.mark.parametrize("family", ["deberta", "deberta-v2", "mpnet"])
def test_another_module_beside_the_layers_is_captured_again(family, replays):
    """A graph reads the weights of the old one; it lies in the encoder, which holds the layers too."""
    model, batch = warm(family)
    encoder, captures = model.backbone.encoder, replays.captures
    name = "relative_attention_bias" if family == "mpnet" else "rel_embeddings"
    setattr(encoder, name, copy.deepcopy(getattr(encoder, name)))
    model(**batch)
    assert replays.captures > captures


@pytest.mark.parametrize("part", ["backbone", "backbone.rotary_emb"])
def test_what_layers_take_besides_hidden_states_is_that_of_the_backbone_of_the_batch(part, replays):
    model, batch = warm("llama")
    model.set_submodule(part, copy.deepcopy(model.get_submodule(part)))
    model.backbone.rotary_emb.inv_freq.mul_(3)
    expected = early_answers(model, batch)
    for _ in range(3):
        agrees(model(**batch), expected)


def test_levels_that_are_not_used_make_room(replays, monkeypatch):
    monkeypatch.setattr(captured, "MAX_LEVELS", 2)
    model, batch = varied()
    model.configure(path="captured", compaction="never")
    sizes = []
    for rows in (1, 30, 1, 90):
        model(**{name: values[:1].repeat(rows, 1) for name, values in batch.items()})
        sizes.append([level.size.tokens for level in levels_of(model)])
    assert [len(each) for each in sizes] == [1, 2, 2, 2] and sizes[0][0] in sizes[3]


@pytest.mark.parametrize("out_of_memory", [False, True])
def test_dropped_buffers_wait_for_the_current_stream(out_of_memory, replays, monkeypatch):
    """Another stream may still work on them."""
    monkeypatch.setattr(captured, "MAX_LEVELS", 1)
    released, release = [], Level.release
    monkeypatch.setattr(Level, "release", lambda level: released.append(level))
    model, batch = varied("modernbert")  # whose layers take positions
    model.configure(path="captured", compaction="never")
    model(**{name: values[:1] for name, values in batch.items()})
    (level,) = levels_of(model)
    if out_of_memory:
        model.runner.paths["captured"].layers.refuse(None, torch.OutOfMemoryError())
    else:
        model(**batch)
    assert released == [level] and level not in levels_of(model)

    held = []
    buffers = [SimpleNamespace(device=torch.device("cuda"), record_stream=held.append) for _ in range(5)]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    places = dataclasses.replace(level.request, positions=buffers[3], columns=buffers[4])
    release(Level(level.size, *buffers[:3], places))
    assert held == ["stream"] * 5


@pytest.mark.parametrize("wrong", [0.5, float("nan")])
def test_capture_that_computes_something_else_is_refused(wrong, replays, caplog):
    model, batch = varied()
    expected = family_answers(model, batch)
    agrees(model(**batch), expected)
    replays.wrong = wrong
    for _ in range(3):
        agrees(model(**batch), expected)
    assert "layer 1 computes something else when it is captured" in caplog.text


def test_comparison_can_be_switched_off(replays, monkeypatch):
    monkeypatch.setenv(self_test.VARIABLE, "0")
    model, batch = varied()
    expected = family_answers(model, batch)
    agrees(model(**batch), expected)
    agrees(model(**batch), expected)
    assert replays.captures > model.depth / 2 and not replays.replays


def test_second_thread_runs_eagerly_and_does_not_wait(replays):
    model, batch = varied()
    expected = family_answers(model, batch)
    for _ in range(3):
        model(**batch)
    parts = model.stream(**batch)
    next(parts)  # a pass under way
    before, got = replays.replays, []
    thread = threading.Thread(target=lambda: got.append(model(**batch)))
    thread.start()
    thread.join(timeout=60)
    agrees(got[0], expected)
    assert replays.replays == before
    for _ in parts:
        pass
    agrees(model(**batch), expected)
    assert replays.replays > before


def test_each_batch_waits_for_the_work_of_the_one_before(replays, monkeypatch):
    waits = []
    monkeypatch.setattr(captured, "_nothing", lambda: waits.append(1))  # stands for an event of the device
    model, batch = varied()
    family_answers(model, batch)
    for number in range(1, 4):
        model(**batch)
        assert len(waits) == number


@pytest.mark.parametrize("how", ["closed", "dropped", "failed", "refused"])
def test_pass_that_ends_early_gives_its_place_back(how, replays, monkeypatch):
    model, batch = varied()
    expected = family_answers(model, batch)
    for _ in range(3):
        model(**batch)
    if how == "refused":
        model.configure(backend="cpp")
        model.double()
        with pytest.raises(ee.BackendUnavailableError):
            model(**batch)
        model.float()
        model.configure(backend="auto")
        for _ in range(2):
            agrees(model(**batch), expected)
    elif how == "failed":
        model.config.strict = True
        with parameter_set(model.heads.out[0].bias, 0, torch.nan), pytest.raises(ee.InvalidLogitsError):
            model(**batch)
        model.config.strict = False
    else:
        parts = model.stream(**batch)
        next(parts)
        if how == "closed":
            parts.close()
        del parts
    before = replays.replays
    agrees(model(**batch), expected)
    assert replays.replays > before


def test_autocast_compile_training_and_copies_capture_nothing(replays, monkeypatch):
    model, batch = varied()
    model.configure(path="auto")
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            model(**batch)
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        for _ in range(3):
            model(**batch)
    assert not replays.captures
    for _ in range(3):
        model(**batch)
    assert levels_of(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not levels_of(other)
        agrees(other(**batch), model(**batch))
    model.train()
    assert not levels_of(model)


@pytest.mark.parametrize("late", [False, True])
def test_rows_move_to_smaller_levels(late, replays, cheap, monkeypatch):
    """Also where the counts of a layer arrive after the next one."""
    model, batch = varied()
    batch = {name: values.repeat(8, 1) for name, values in batch.items()}
    expected = family_answers(model, batch)
    arrived = []

    class Late(loop.counts_for(1, torch.device("cpu"), exact=True).__class__):
        """The counts of the layer before."""

        def after(self, layer, counts, bounds):
            arrived.append(super().after(layer, counts, bounds))
            return arrived[-2] if len(arrived) > 1 and layer > 1 else bounds

    if late:
        monkeypatch.setattr(loop, "counts_for", lambda depth, device, exact: Late(depth))
    for _ in range(3):
        arrived.clear()
        agrees(model(**batch), expected)
    sizes = [level.size.tokens for level in levels_of(model)]
    assert len(sizes) > 1 and sizes == sorted(sizes, reverse=True)
