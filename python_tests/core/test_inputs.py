"""Inputs: empty batches, invalid arguments, and valid ones in unusual forms."""

from __future__ import annotations

import pytest
import torch
from support.models import CLASSES, DEPTH, batch_for, early_exit, holes_of, ragged, stock
from transformers import BatchEncoding

import earlyexit_kernels as ee
from earlyexit_kernels.criteria import QExit

#: One of each way to position, attend and pool.
FAMILIES = ("bert", "roberta", "albert", "distilbert", "modernbert", "eurobert", "llama", "gemma2", "deberta", "mpnet")

# empty inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_empty_batch(family):
    model = early_exit(family, halting=True, criterion=QExit(q=0.5))
    batch = {name: value[:0] for name, value in batch_for(model).items()}
    out = model(**batch)
    assert out.logits.shape == (0, CLASSES) and out.exit_layer.shape == out.layers_run.shape == (0,)
    assert out.logits.dtype == torch.float32 and out.exit_layer.dtype == torch.int64 and out.all_logits is None
    assert model(**batch, output_all_logits=True).all_logits.shape == (0, DEPTH, CLASSES)
    assert model(input_ids=torch.zeros(0, 0, dtype=torch.long)).logits.shape == (0, CLASSES)
    trace = model.trace(**batch)
    assert trace.logits.shape == (0, DEPTH, CLASSES) and trace.aux["halting"].shape == (0, DEPTH)
    assert ee.replay(trace, model.criterion)[1].shape == (0,)


@pytest.mark.parametrize("pooling", [None, "mean"])
@pytest.mark.parametrize("family", FAMILIES)
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


INVALID = [
    ({}, r"input_ids: expected .*\[N, S\], got None"),
    ({"input_ids": torch.ones(5, dtype=torch.long)}, r"input_ids: .*got shape \[5\]"),
    ({"input_ids": torch.ones(1, 2, 3, dtype=torch.long)}, r"input_ids: .*got shape \[1, 2, 3\]"),
    ({"input_ids": torch.ones(2, 5)}, "input_ids: expected integers, got torch.float32"),
    ({"input_ids": torch.ones(2, 5, dtype=torch.bool)}, "input_ids: expected integers, got torch.bool"),
    ({"input_ids": torch.zeros(3, 0).long()}, r"input_ids: expected at least one token a row, got shape \[3, 0\]"),
    ({"input_ids": torch.ones(2, 71, dtype=torch.long)}, "a row may have 70 tokens in this model, got 71"),
    ({"attention_mask": torch.ones(2, 6)}, r"attention_mask: expected the shape .*\[2, 5\], got \[2, 6\]"),
    ({"attention_mask": torch.ones(1, 5)}, r"attention_mask: expected the shape .*\[2, 5\], got \[1, 5\]"),
    ({"token_type_ids": torch.zeros(2, 5)}, "token_type_ids: expected integers.*got torch.float32"),
    ({"token_type_ids": torch.zeros(2, 4, dtype=torch.long)}, r"token_type_ids: expected .*got .*\[2, 4\]"),
    ({"position_ids": torch.zeros(3, 5, dtype=torch.long)}, r"position_ids: expected .*got .*\[3, 5\]"),
]
#: Arguments that lie on another device, or whose mask has another shape or another meaning.
IDS = torch.ones(2, 5, dtype=torch.long)
INVALID += [
    ({name: IDS.to("meta")}, f"{name} is on meta, the model on cpu")
    for name in ("input_ids", "attention_mask", "token_type_ids", "position_ids")
]
INVALID += [
    ({"attention_mask": torch.ones(shape)}, r"attention_mask: expected the shape of input_ids \[2, 5\], got")
    for shape in ((2, 1, 5, 5), (2, 5, 5), (5,))
]
INVALID += [
    ({"input_ids": [[1, 2]]}, "input_ids: expected .*list"),
    ({"attention_mask": [[1, 1]]}, "attention_mask: expected .*list"),
]


#: Numbers out of range, which the fixed-depth form cannot check without branches.
OUT_OF_RANGE = [
    ({"input_ids": torch.tensor([[5, -1]])}, r"expected ids in \[0, 119\], got -1"),
    ({"input_ids": torch.tensor([[5, 120]])}, r"expected ids in \[0, 119\], got 120"),
    ({"token_type_ids": torch.full((2, 5), 2)}, r"token_type_ids: expected .*\[0, 1\], got 2"),
    ({"position_ids": torch.full((2, 5), 70)}, r"position_ids: expected .*\[0, 69\], got 70"),
    ({"position_ids": torch.full((2, 5), -1)}, r"position_ids: expected .*got -1"),
    ({"attention_mask": torch.full((2, 5), -1e4)}, "expected 1 for a token and 0 for none, got negative numbers"),
    ({"attention_mask": torch.full((2, 5), torch.nan)}, "expected 1 for a token and 0 for none, got NaN"),
]


def test_invalid_input_is_named():
    model = early_exit()
    calls = model, model.trace, model.stream
    for table, asked in ((INVALID, (*calls, model.fixed_depth())), (OUT_OF_RANGE, calls)):
        for inputs, message in table:
            ids = IDS if inputs and "input_ids" not in inputs else None
            for call in asked:
                with pytest.raises(ValueError, match=message):
                    call(**{"input_ids": ids, **inputs})


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


def test_rows_of_maximum_length():
    base = stock()
    ids = torch.full((1, 70), 9)
    assert (ee.to_early_exit(base)(input_ids=ids).logits - base(input_ids=ids).logits).abs().max() < 1e-5
    model = early_exit("roberta")
    assert model(input_ids=torch.full((1, 68), 9)).logits.shape == (1, CLASSES)
    words = "a row may have 68 tokens in this model, got 69; tokenize with truncation=True, max_length=68"
    with pytest.raises(ValueError, match=words):
        model(input_ids=torch.full((1, 69), 9))


def test_dtypes_of_inputs():
    model, batch = early_exit(), ragged()
    types, positions = torch.ones_like(batch["input_ids"]), torch.arange(17).expand(4, -1)
    batch |= {"token_type_ids": types, "position_ids": positions}
    expected = model(**batch)
    for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8):
        assert torch.equal(model(**{name: value.to(dtype) for name, value in batch.items()}).logits, expected.logits)
    for dtype in (torch.bool, torch.float32):
        out = model(**{**batch, "attention_mask": batch["attention_mask"].to(dtype)})
        assert torch.equal(out.logits, expected.logits)


def test_token_types_of_a_family_without_their_table():
    """Tokenizers give zeros."""
    model, batch = early_exit("deberta-v2"), ragged()
    assert model.backbone.config.type_vocab_size == 0
    expected = model(**batch).logits
    assert torch.equal(model(**batch, token_type_ids=torch.zeros_like(batch["input_ids"])).logits, expected)


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


@pytest.mark.parametrize(("asked", "training"), [("output_hidden_states", True), ("output_attentions", False)])
def test_hidden_states_and_attentions_are_refused(asked, training):
    model, batch = early_exit().train(training), ragged()
    with pytest.raises(ValueError, match=r"rows leave at different layers.*model\.backbone"):
        model(**batch, **{asked: True})
    assert model(**batch, **{asked: False}).logits.shape == (4, CLASSES)


@pytest.mark.parametrize(("family", "pooling"), [("bert", None), ("eurobert", "first"), ("deberta", None)])
def test_left_padding_is_refused_unless_pooling_is_mean(family, pooling):
    model = early_exit(family, pooling=pooling)
    message = r"first token of row 1 is masked, .*; pad on the right \(tokenizer.padding_side = 'right'\)$"
    with pytest.raises(ValueError, match=message):
        model(**batch_for(model, "left"))
    batch = batch_for(model, holes_of(family))
    batch["attention_mask"][2, 0] = 0
    with pytest.raises(ValueError, match="first token of row 2 is masked"):
        model(**batch)
