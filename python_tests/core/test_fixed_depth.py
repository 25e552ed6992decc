"""The fixed-depth mode against the model."""

from __future__ import annotations

import copy

import pytest
import torch
from support.models import (
    ALL_FAMILIES,
    FIRST_TOKEN,
    batch_for,
    early_exit,
    kinds_of,
    parameter_set,
    varied_entropy,
)
from support.rule_models import LENGTHS, NEVER_EARLY, RULES, TOLERANCE, assert_same_answers, model_for_rule, part_of

import earlyexit_kernels as ee
from earlyexit_kernels.core.fixed_depth import padded_row_keys, with_a_token
from earlyexit_kernels.core.packing import pack, row_keys
from earlyexit_kernels.criteria import CRITERIA

# answers


def test_every_rule_is_tested():
    assert set(RULES.values()) == set(CRITERIA)


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", RULES)
def test_equals_the_model(name):
    model, batch = model_for_rule(name, pooling="mean" if list(RULES).index(name) % 2 else None)
    expected = model(**batch)
    assert name in NEVER_EARLY or len(expected.exit_layer.unique()) >= 2
    fixed = model.fixed_depth()
    assert_same_answers(fixed(**batch), expected)
    for kind in ("right", "full"):
        other = batch_for(model, kind, lengths=LENGTHS, seed=1)
        assert_same_answers(fixed(**other), model(**other))
    assert_same_answers(fixed(batch["input_ids"]), model(batch["input_ids"]))


@pytest.mark.sample(4)
@pytest.mark.parametrize(("family", "pooling"), [(f, p) for f in ALL_FAMILIES for p in (None, "mean")])
def test_equals_the_model_of_every_family(family, pooling):
    model = early_exit(family, pooling=pooling)
    batch = batch_for(model, lengths=LENGTHS)
    model.set_criterion(varied_entropy(model.trace(**batch)))
    fixed = model.fixed_depth()
    assert len(model(**batch).exit_layer.unique()) == model.depth
    assert_same_answers(fixed(**batch), model(**batch))
    left = pooling == "mean" or family not in FIRST_TOKEN
    for kind in (*kinds_of(family)[1:], *(["left"] if left and pooling != "first" else [])):
        other = batch_for(model, kind, lengths=LENGTHS)
        assert_same_answers(fixed(**other), model(**other))
    ids = batch["input_ids"]
    types = (torch.arange(ids.shape[1]) > 6).long().expand(ids.shape)
    positions = torch.arange(ids.shape[1]).expand(ids.shape) * 2 + 3
    for given in ({"token_type_ids": types}, {"position_ids": positions}, {"position_ids": positions[:1]}):
        if family in ("distilbert", "deberta-v2") or (
            "token_type_ids" in given and family not in ("bert", "albert", "electra")
        ):
            continue
        assert_same_answers(fixed(**batch, **given), model(**batch, **given))
        assert not torch.equal(fixed(**batch, **given)[0], fixed(**batch)[0])


def test_left_padding_reads_the_first_unmasked_token():
    """For a family that counts positions from the ids, equal to the same rows padded on the right."""
    model, right = model_for_rule("entropy", "roberta", kind="right")
    lengths = right["attention_mask"].sum(1).tolist()
    left = {name: torch.full_like(values, 1 if name == "input_ids" else 0) for name, values in right.items()}
    for row, length in enumerate(lengths):
        for name, values in right.items():
            left[name][row, -length:] = values[row, :length]
    assert_same_answers(model.fixed_depth()(**left), model(**right))


@pytest.mark.parametrize("kind", ["full", "right", "holes"])
def test_keys_equal_those_of_packed_rows(kind):
    _, batch = model_for_rule("sampled_exit", kind=kind)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    mask[3] = 0
    packed = pack(ids, mask)
    expected = row_keys(packed.take(ids), packed.offsets)
    assert torch.equal(padded_row_keys(ids, with_a_token(mask != 0)), expected)
    everything = pack(ids, None)
    assert torch.equal(padded_row_keys(ids, None), row_keys(everything.take(ids), everything.offsets))


def test_keys_depend_on_the_order_of_the_tokens():
    assert len(padded_row_keys(torch.tensor([[3, 5, 9], [5, 3, 9], [9, 5, 3]]), None).unique()) == 3


@pytest.mark.parametrize("name", ["entropy", "sampled_exit", "skip_gate"])
def test_small_batches_and_rows_without_tokens(name):
    model, batch = model_for_rule(name)
    fixed = model.fixed_depth()
    for rows in (slice(2, 3), slice(0, 0)):
        assert_same_answers(fixed(**part_of(batch, rows)), model(**part_of(batch, rows)))
    assert_same_answers(fixed(**part_of(batch, slice(0, 4), 1)), model(**part_of(batch, slice(0, 4), 1)))
    batch["attention_mask"][1] = 0
    assert_same_answers(fixed(**batch), model(**batch))
    nothing = torch.zeros(0, 0, dtype=torch.long)
    assert_same_answers(fixed(nothing, nothing), model(nothing, nothing))


@pytest.mark.parametrize("name", ["patience", "skip_gate"])
def test_invalid_logits_do_not_affect_other_rows(name):
    model, batch = model_for_rule(name)
    clean = model(**batch)
    poison = 118
    batch["input_ids"][2] = poison
    with parameter_set(model.get_input_embeddings().weight, poison, float("nan")):
        logits, exit_layer = model.fixed_depth()(**batch)
        expected = model(**batch)
    assert torch.equal(exit_layer, expected.exit_layer) and exit_layer[2] == model.depth
    assert logits[2].isnan().all() and expected.logits[2].isnan().all()
    others = torch.arange(len(LENGTHS)) != 2
    assert torch.equal(exit_layer[others], clean.exit_layer[others])
    assert (logits[others] - clean.logits[others]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", ["patience", "q_exit"])
def test_an_invalid_exit_keeps_the_state_of_its_rows(name):
    model, batch = model_for_rule(name)
    clean = model(**batch).exit_layer
    with parameter_set(model.heads.out[0].bias, 0, float("nan")):
        expected = model(**batch)
        assert_same_answers(model.fixed_depth()(**batch), expected)
    assert (expected.exit_layer > clean).any() and (expected.exit_layer < model.depth).any()


@pytest.mark.parametrize(("name", "pooling"), [("entropy", "mean"), ("skip_gate", None)])
def test_masked_tokens_do_not_affect_a_row(name, pooling):
    """Even if their embedding is NaN."""
    model, batch = model_for_rule(name, pooling=pooling)
    expected = model(**batch)
    masked = batch["attention_mask"] == 0
    batch["input_ids"][masked] = 118
    with parameter_set(model.get_input_embeddings().weight, 118, float("nan")):
        assert_same_answers(model.fixed_depth()(**batch), expected)


# around the module


def test_shares_the_parameters_and_does_not_change_the_model():
    model, batch = model_for_rule()
    before, config, expected = dict(model.state_dict()), model.config.to_dict(), model(**batch)
    fixed = model.fixed_depth()
    fixed(**batch)
    after, own = model.state_dict(), fixed.state_dict()
    assert list(after) == list(before) == list(own)
    assert all(own[name].data_ptr() == values.data_ptr() for name, values in after.items())
    assert model.config.to_dict() == config and not any(isinstance(m, type(fixed)) for m in model.modules())
    again = model(**batch)
    assert torch.equal(again.logits, expected.logits) and torch.equal(again.exit_layer, expected.exit_layer)


def test_keeps_its_criterion_and_copies_are_independent():
    model, batch = model_for_rule()
    fixed, expected = model.fixed_depth(), model(**batch)
    model.set_criterion(None)
    with torch.enable_grad():
        assert not fixed(**batch)[0].requires_grad
    assert_same_answers(fixed(**batch), expected)
    assert model.fixed_depth()(**batch)[1].eq(model.depth).all()
    twin = copy.deepcopy(fixed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert twin(**batch)[0].abs().sum() > 0 and fixed(**batch)[0].abs().sum() == 0


def test_train_mode_is_refused():
    model, batch = model_for_rule()
    fixed = model.fixed_depth()
    message = r"expected the model in eval mode, got train mode; call model.eval\(\) first"
    model.train()
    for call in (model.fixed_depth, lambda: fixed(**batch)):
        with pytest.raises(RuntimeError, match=message):
            call()
    model.eval()
    assert_same_answers(fixed(**batch), model(**batch))
    with pytest.raises(RuntimeError, match=message):
        fixed.train()(**batch)
    assert_same_answers(fixed.eval()(**batch), model.eval()(**batch))


def test_what_it_cannot_do_is_refused():
    model, batch = model_for_rule(strict=True)
    with pytest.raises(ValueError, match=r"strict=True reads the logits .*config\.strict = False"):
        model.fixed_depth()
    model.config.strict = False
    fixed = model.fixed_depth()
    model.backbone.set_attn_implementation("eager")
    with pytest.raises(ee.AttentionReplacedError, match="attention to be 'earlyexit_packed', got 'eager'"):
        fixed(**batch)
