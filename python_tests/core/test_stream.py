"""`model.stream`: the answers of `forward`, bit for bit, each row once, in exit order."""

from __future__ import annotations

import pytest
import torch
from support.models import DEPTH, batch_for, early_exit, parameter_set, varied
from support.rule_models import RULES, model_for_rule

import earlyexit_kernels as ee


def joined(parts, rows, classes=3):
    """Return logits and exit layers in request order; each row must have come once, in exit order."""
    parts = list(parts)
    logits, exit_layer = torch.full((rows, classes), torch.nan), torch.zeros(rows, dtype=torch.int64)
    for part in parts:
        assert part.rows.dtype == part.exit_layer.dtype == torch.int64 and part.logits.dtype == torch.float32
        assert part.rows.shape == part.exit_layer.shape == part.logits.shape[:1] and part.rows.numel()
        logits[part.rows], exit_layer[part.rows] = part.logits, part.exit_layer
    order = torch.cat([part.rows for part in parts])
    assert torch.equal(order.sort().values, torch.arange(rows))
    assert torch.equal(exit_layer[order], exit_layer.sort().values)
    return logits, exit_layer


def assert_streams_as_forward(model, batch):
    expected, parts = model(**batch), list(model.stream(**batch))
    logits, exit_layer = joined(parts, *expected.logits.shape)
    assert torch.equal(exit_layer, expected.exit_layer) and torch.equal(logits, expected.logits)
    layers = expected.exit_layer.unique().tolist()
    assert [set(part.exit_layer.tolist()) for part in parts] == [{layer} for layer in layers]
    return layers


@pytest.mark.parametrize("family", ["bert", "albert", "modernbert", "deberta-v2", "llama"])
def test_families(family):
    assert len(assert_streams_as_forward(*varied(family))) >= 3


@pytest.mark.sample(2)
@pytest.mark.parametrize("rule", RULES)
def test_rules(rule):
    """Skip gates, states, halting memory and regression among them."""
    assert_streams_as_forward(*model_for_rule(rule))


def test_one_row_no_row_and_full_depth():
    model, batch = varied()
    assert_streams_as_forward(model, {name: values[:1] for name, values in batch.items()})
    assert list(model.stream(**{name: values[:0] for name, values in batch.items()})) == []
    model.set_criterion(None)
    assert assert_streams_as_forward(model, batch) == [DEPTH]


def test_part_comes_before_the_next_layer_runs():
    model, batch = varied()
    model.configure(path="eager")
    ran = []
    for number, layer in enumerate(model.backbone.encoder.layer, start=1):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    for part in model.stream(**batch):
        assert ran == list(range(1, int(part.exit_layer[0]) + 1))


def test_pass_keeps_its_criterion_and_grad_mode():
    model, batch = varied()
    expected = model(**batch)
    parts = model.stream(**batch)
    first = next(parts)
    model.set_criterion(None)
    assert torch.is_grad_enabled() and not first.logits.requires_grad
    logits, exit_layer = joined([first, *parts], 12)
    assert torch.equal(exit_layer, expected.exit_layer) and torch.equal(logits, expected.logits)


@pytest.mark.parametrize("rule", ["patience", "q_exit"])
def test_parts_in_and_outside_of_inference_mode(rule, backend):
    model, batch = model_for_rule(rule)
    model.configure(backend=backend)
    expected = model(**batch)
    for first in (True, False):
        parts = model.stream(**batch)
        with torch.inference_mode(first):
            begun = next(parts)
        with torch.inference_mode(not first):
            assert torch.is_inference_mode_enabled() is not first
            assert torch.equal(joined([begun, *parts], 16)[0], expected.logits)


def test_pass_left_half_way_leaves_the_model_usable():
    model, batch = varied()
    expected = model(**batch)
    for _ in range(3):
        next(model.stream(**batch))
        parts = model.stream(**batch)
        next(parts)
        parts.close()
    alternating = [part for pair in zip(model.stream(**batch), model.stream(**batch), strict=True) for part in pair]
    for parts in (alternating[::2], alternating[1::2]):
        assert torch.equal(joined(parts, 12)[0], expected.logits)
    assert_streams_as_forward(model, batch)


def test_invalid_logits_are_counted_or_refused():
    model, batch = varied()
    with parameter_set(model.get_input_embeddings().weight, int(batch["input_ids"][0, 0]), torch.nan):
        expected = model(**batch)
        counted = model.invalid_rows
        logits, exit_layer = joined(model.stream(**batch), 12)
        assert torch.equal(exit_layer, expected.exit_layer) and logits.isnan().any(dim=1).sum() >= 1
        assert torch.equal(logits.nan_to_num(), expected.logits.nan_to_num())
        assert counted > 0 and model.invalid_rows == 2 * counted
        model.config.strict = True
        with pytest.raises(ee.InvalidLogitsError, match="at layer 1 of 4"):
            list(model.stream(**batch))
    model.config.strict = False
    assert_streams_as_forward(model, batch)


REFUSED = [
    ({"labels": torch.zeros(12)}, ValueError, r"stream: expected inputs among .*, got \['labels'\]"),
    ({"inputs_embeds": torch.zeros(1, 2, 3)}, ValueError, r"got \['inputs_embeds'\]"),
    ({"input_ids": torch.zeros(3, dtype=torch.int64)}, ValueError, r"pass input_ids\[None\]"),
    ({}, RuntimeError, r"stream: expected the model in eval mode, got train mode; call model.eval"),
]


def test_wrong_inputs_and_train_mode_are_refused_at_the_call():
    for arguments, error, words in REFUSED:
        model = early_exit().train(error is RuntimeError)
        with pytest.raises(error, match=words):
            model.stream(**{**batch_for(model), **arguments})
