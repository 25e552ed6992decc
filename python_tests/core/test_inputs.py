"""Inputs: empty batches, invalid arguments, and valid ones in unusual forms."""

from __future__ import annotations

import pytest
import torch
from support.models import ALL_FAMILIES, CLASSES, DEPTH, FIRST_TOKEN, batch_for, early_exit, holes_of, ragged, stock
from transformers import BatchEncoding

import earlyexit_kernels as ee
from earlyexit_kernels.criteria import QExit

# empty inputs


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("pooling", [None, "mean"])
def test_empty_batch(family, pooling):
    model = early_exit(family, pooling=pooling, halting=True, criterion=QExit(q=0.5))
    batch = {name: value[:0] for name, value in batch_for(model).items()}
    out = model(**batch)
    assert out.logits.shape == (0, CLASSES) and out.exit_layer.shape == out.layers_run.shape == (0,)
    assert out.logits.dtype == torch.float32 and out.exit_layer.dtype == torch.int64 and out.all_logits is None
    assert model(**batch, output_all_logits=True).all_logits.shape == (0, DEPTH, CLASSES)
    assert model(input_ids=torch.zeros(0, 0, dtype=torch.long)).logits.shape == (0, CLASSES)
    trace = model.trace(**batch)
    assert trace.logits.shape == (0, DEPTH, CLASSES) and trace.aux["halting"].shape == (0, DEPTH)
    assert ee.replay(trace, model.criterion)[1].shape == (0,)


def test_rows_without_tokens_are_refused():
    with pytest.raises(ValueError, match=r"input_ids: expected at least one token a row, got shape \[3, 0\]"):
        early_exit()(input_ids=torch.zeros(3, 0, dtype=torch.long))


@pytest.mark.parametrize("pooling", [None, "mean"])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_row_of_padding_only_is_finite_and_does_not_affect_others(family, pooling):
    model = early_exit(family, pooling=pooling)
    batch = batch_for(model)
    expected = model(**batch).logits
    batch["attention_mask"][1] = 0
    out = model(**batch, output_all_logits=True)
    assert torch.isfinite(out.all_logits).all()
    assert (out.logits[[0, 2, 3]] - expected[[0, 2, 3]]).abs().max() < 1e-5
    batch["attention_mask"][:] = 0
    assert torch.isfinite(model(**batch).logits).all()


# invalid arguments


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, r"input_ids: expected .*\[N, S\], got None"),
        ({"input_ids": torch.ones(5, dtype=torch.long)}, r"input_ids: .*got shape \[5\]"),
        ({"input_ids": torch.ones(1, 2, 3, dtype=torch.long)}, r"input_ids: .*got shape \[1, 2, 3\]"),
        ({"input_ids": torch.ones(2, 5)}, "input_ids: expected integers, got torch.float32"),
        ({"input_ids": torch.ones(2, 5, dtype=torch.bool)}, "input_ids: expected integers, got torch.bool"),
        ({"input_ids": torch.ones(2, 71, dtype=torch.long)}, "a row may have 70 tokens in this model, got 71"),
        ({"input_ids": torch.tensor([[5, -1]])}, r"expected ids in \[0, 119\], got -1"),
        ({"input_ids": torch.tensor([[5, 120]])}, r"expected ids in \[0, 119\], got 120"),
        ({"attention_mask": torch.ones(2, 6)}, r"attention_mask: expected the shape .*\[2, 5\], got \[2, 6\]"),
        ({"attention_mask": torch.ones(1, 5)}, r"attention_mask: expected the shape .*\[2, 5\], got \[1, 5\]"),
        ({"token_type_ids": torch.zeros(2, 5)}, "token_type_ids: expected integers.*got torch.float32"),
        ({"token_type_ids": torch.zeros(2, 4, dtype=torch.long)}, r"token_type_ids: expected .*got .*\[2, 4\]"),
        ({"token_type_ids": torch.full((2, 5), 2)}, r"token_type_ids: expected .*\[0, 1\], got 2"),
        ({"position_ids": torch.zeros(3, 5, dtype=torch.long)}, r"position_ids: expected .*got .*\[3, 5\]"),
        ({"position_ids": torch.full((2, 5), 70)}, r"position_ids: expected .*\[0, 69\], got 70"),
        ({"position_ids": torch.full((2, 5), -1)}, r"position_ids: expected .*got -1"),
    ],
)
def test_invalid_input_is_named(inputs, message):
    ids = torch.ones(2, 5, dtype=torch.long) if inputs and "input_ids" not in inputs else None
    model = early_exit()
    for call in (model, model.trace):
        with pytest.raises(ValueError, match=message):
            call(**{"input_ids": ids, **inputs})


@pytest.mark.parametrize("argument", ["input_ids", "attention_mask"])
def test_list_is_refused(argument):
    batch = ragged()
    batch[argument] = batch[argument].tolist()
    with pytest.raises((TypeError, ValueError), match=f"{argument}: expected .*list"):
        early_exit()(**batch)


def test_refused_input_names_its_cure():
    """What users pass by mistake: untensored token ids, a whole batch in one argument, text, labels as a list."""
    model, ids = early_exit(), torch.ones(2, 5, dtype=torch.long)
    tensors = r'tokenizer\(texts, padding=True, return_tensors="pt"\)'
    for given in (ids.tolist(), ids.numpy(), "a text", ["a text"]):
        for call in (model, model.trace, model.fixed_depth()):
            with pytest.raises(ValueError, match=rf"input_ids: expected a tensor .*{tensors}"):
                call(input_ids=given)
    batch = BatchEncoding({"input_ids": ids})
    for call in (model, model.fixed_depth()):
        with pytest.raises(ValueError, match=r"input_ids: .*got BatchEncoding; .*\*\*batch"):
            call(batch)
    with pytest.raises(ValueError, match=r"labels: expected a tensor, got list; .*torch.tensor\(labels\)"):
        model(input_ids=ids, labels=[0, 1])


def test_row_of_maximum_length():
    base = stock()
    ids = torch.full((1, 70), 9)
    assert (ee.to_early_exit(base)(input_ids=ids).logits - base(input_ids=ids).logits).abs().max() < 1e-5


def test_maximum_length_of_roberta():
    model = early_exit("roberta")
    assert model(input_ids=torch.full((1, 68), 9)).logits.shape == (1, CLASSES)
    with pytest.raises(
        ValueError, match="a row may have 68 tokens in this model, got 69; tokenize with truncation=True, max_length=68"
    ):
        model(input_ids=torch.full((1, 69), 9))


@pytest.mark.parametrize("argument", ["input_ids", "attention_mask", "token_type_ids", "position_ids"])
def test_inputs_on_another_device_are_refused(argument):
    batch = ragged("full")
    batch |= {"token_type_ids": torch.zeros_like(batch["input_ids"]), "position_ids": torch.arange(17).expand(4, -1)}
    batch[argument] = batch[argument].to("meta")
    with pytest.raises(ValueError, match=f"{argument} is on meta, the model on cpu"):
        early_exit()(**batch)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_integer_dtypes(dtype):
    model, batch = early_exit(), ragged()
    batch |= {"token_type_ids": torch.ones_like(batch["input_ids"]), "position_ids": torch.arange(17).expand(4, -1)}
    got = model(**{name: value.to(dtype) for name, value in batch.items()})
    assert torch.equal(got.logits, model(**batch).logits)


def test_strided_and_expanded_inputs():
    model, batch = early_exit(), ragged()
    expected = model(**batch)
    wide = {name: torch.stack([value, value + 1], dim=-1).flatten(1)[:, ::2] for name, value in batch.items()}
    turned = {name: value.t().contiguous().t() for name, value in batch.items()}
    for strided in (wide, turned):
        assert not any(value.is_contiguous() for value in strided.values())
        assert torch.equal(model(**strided).logits, expected.logits)
    one = {name: value[:1].expand(4, -1) for name, value in batch.items()}
    assert (model(**one).logits - expected.logits[:1]).abs().max() < 1e-5


# unsupported outputs and masks


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions"])
@pytest.mark.parametrize("training", [True, False])
def test_hidden_states_and_attentions_are_refused(asked, training):
    model, batch = early_exit(), ragged()
    model.train(training)
    with pytest.raises(ValueError, match=r"rows leave at different layers.*model\.backbone"):
        model(**batch, **{asked: True})
    assert model(**batch, **{asked: False}).logits.shape == (4, CLASSES)


@pytest.mark.parametrize("family", FIRST_TOKEN)
@pytest.mark.parametrize("pooling", [None, "first"])
def test_left_padding_is_refused_unless_pooling_is_mean(family, pooling):
    model = early_exit(family, pooling=pooling)
    message = r"first token of row 1 is masked, .*; pad on the right \(tokenizer.padding_side = 'right'\)$"
    with pytest.raises(ValueError, match=message):
        model(**batch_for(model, "left"))
    batch = batch_for(model, holes_of(family))
    batch["attention_mask"][2, 0] = 0
    with pytest.raises(ValueError, match="first token of row 2 is masked"):
        model(**batch)


@pytest.mark.parametrize("shape", [(4, 1, 17, 17), (4, 17, 17), (1, 17), (4, 16), (17,)])
def test_mask_of_wrong_shape_is_refused(shape):
    model = early_exit()
    with pytest.raises(ValueError, match=r"attention_mask: expected the shape of input_ids \[4, 17\], got"):
        model(input_ids=ragged()["input_ids"], attention_mask=torch.ones(shape, dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float32, torch.uint8])
def test_mask_dtypes(dtype):
    model, batch = early_exit(), ragged()
    expected = model(**batch)
    out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"].to(dtype))
    assert torch.equal(out.logits, expected.logits) and torch.equal(out.exit_layer, expected.exit_layer)


def test_additive_masks_are_refused():
    model, batch = early_exit(pooling="mean"), ragged()
    with pytest.raises(ValueError, match="attention_mask: expected 1 for a token and 0 for none, got negative numbers"):
        model(input_ids=batch["input_ids"], attention_mask=(batch["attention_mask"] - 1.0) * 1e4)
