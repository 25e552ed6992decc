"""Classifiers on decoders: the last token, padding on both sides, no padding token; and what is refused."""

from __future__ import annotations

import pytest
import torch
from support.models import ALL_FAMILIES, DECODERS, LENGTHS, RECTANGULAR, batch_for, early_exit, ragged, stock

import earlyexit_kernels as ee

TOLERANCE = 1e-5
every_decoder = pytest.mark.parametrize("family", DECODERS)


def answers(model, batch):
    """Return the full-depth answers of `forward`, of a trace and of the fixed-depth form."""
    return model(**batch).logits, model.trace(**batch).logits[:, -1], model.fixed_depth()(**batch)[0]


@every_decoder
def test_padding_is_that_of_the_stock_model(family):
    """On the left, and without a mask, where padding ids are padding."""
    base = stock(family)
    batch = batch_for(base, "left")
    assert (ee.to_early_exit(base)(**batch).logits - base(**batch).logits).abs().max() <= TOLERANCE
    ids = batch_for(base)["input_ids"]
    assert (ids == 0).any()
    model = ee.to_early_exit(base)
    assert (model(ids).logits - base(ids).logits).abs().max() <= TOLERANCE
    assert (model.fixed_depth()(ids)[0] - base(ids).logits).abs().max() <= TOLERANCE
    ids[:, -1] = 0  # behind the text of every row
    assert (model(ids).logits - base(ids).logits).abs().max() <= TOLERANCE


@every_decoder
def test_without_a_padding_token_the_mask_tells_the_last_token(family):
    """The stock model refuses such a batch, and answers its rows one by one."""
    base = stock(family, pad_token_id=None)
    batch = ragged("right", pad=7)
    with pytest.raises(ValueError, match="Cannot handle batch sizes > 1"):
        base(**batch)
    model = ee.to_early_exit(base)
    alone = torch.cat(
        [base(input_ids=batch["input_ids"][row : row + 1, :length]).logits for row, length in enumerate(LENGTHS)]
    )
    for got in answers(model, batch):
        assert (got - alone).abs().max() <= TOLERANCE


@every_decoder
def test_padding_on_both_sides_is_found_by_the_mask(family):
    """Each row is padded on another side, one on both; a token is attended to wherever its row begins."""
    base = stock(family)
    alone = [torch.arange(7, 7 + length)[None] for length in (9, 4, 6, 3)]
    batch = {name: torch.zeros(4, 9, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    for row, (ids, start) in enumerate(zip(alone, (0, 0, 3, 2), strict=True)):
        place = slice(start, start + ids.shape[1])
        batch["input_ids"][row, place], batch["attention_mask"][row, place] = ids[0], 1
    model = ee.to_early_exit(base)
    expected = torch.cat([base(input_ids=ids).logits for ids in alone])
    for got in answers(model, batch):
        assert (got - expected).abs().max() <= TOLERANCE


@pytest.mark.sample(3)
@pytest.mark.parametrize("family", [family for family in ALL_FAMILIES if family not in DECODERS])
def test_an_encoder_answers_a_row_without_its_masked_last_token(family):
    model = early_exit(family)
    batch = batch_for(model)
    batch["attention_mask"][2, LENGTHS[2] - 1] = 0
    alone = model(input_ids=batch["input_ids"][2:3, : LENGTHS[2] - 1]).logits
    for got in answers(model, batch):
        assert (got[2:3] - alone).abs().max() <= TOLERANCE


@every_decoder
def test_a_masked_last_token_is_refused(family):
    model = early_exit(family)
    batch = batch_for(model)
    batch["attention_mask"][2, LENGTHS[2] - 1] = 0
    for call in (model, model.trace, model.fixed_depth()):
        with pytest.raises(ValueError, match=r"attention_mask: the last token of row 2 that is not padding is masked"):
            call(**batch)


@pytest.mark.parametrize(
    ("family", "size", "least"),
    [
        *((family, "sliding_window", 1) for family in ("mistral", "qwen2", "gemma2", "gemma3_text")),
        ("modernbert", "local_attention", 0),  # columns on both sides, of which the layer takes half, and its own
    ],
)
def test_windows_of_no_column_are_refused(family, size, least):
    base = stock(family, **{size: least})
    batch = batch_for(base)
    assert (ee.to_early_exit(base)(**batch).logits - base(**batch).logits).abs().max() <= TOLERANCE
    with pytest.raises(ValueError, match="sliding_window: expected at least 1, got 0 from "):
        ee.to_early_exit(stock(family, **{size: least - 2 if family == "modernbert" else 0}))(**batch)


WINDOWED = ("qwen2", "gemma2", "gemma3_text", "modernbert")


@pytest.mark.parametrize("family", WINDOWED)
def test_a_window_that_the_layers_do_not_have_is_refused(family):
    """The stock model reads the window from its config at each call, the layers read it when they are made."""
    base = stock(family)
    model, batch = ee.to_early_exit(base), batch_for(base)
    config, before = model.backbone.config, base(**batch).logits
    assert (model(**batch).logits - before).abs().max() <= TOLERANCE
    name = "local_attention" if family == "modernbert" else "sliding_window"
    old, words = getattr(config, name), "window of 5 tokens to each side.* in the config now means 2. Set the config"
    setattr(base.config, name, 2)
    setattr(config, name, 2)
    assert (base(**batch).logits - before).abs().max() > 0.01
    for call in (model, model.trace, model.fixed_depth(), ee.to_early_exit(base), ee.to_early_exit(base).train()):
        with pytest.raises(ValueError, match=words):
            call(**batch)
    setattr(config, name, old)
    assert (model(**batch).logits - before).abs().max() <= TOLERANCE


def test_a_window_that_layers_read_from_their_config_is_followed():
    base = stock("mistral")
    model, batch = ee.to_early_exit(base), batch_for(base)
    for config in (base.config, model.backbone.config):
        config.sliding_window = 2
    assert (ee.to_early_exit(stock("mistral"))(**batch).logits - base(**batch).logits).abs().max() > 0.01
    assert (model(**batch).logits - base(**batch).logits).abs().max() <= TOLERANCE


@pytest.mark.parametrize("family", ["modernbert", "eurobert", *DECODERS])
def test_positions_beyond_the_angles_are_refused(family):
    model, ids = early_exit(family), torch.full((1, 70), 7)
    positions = torch.arange(70)[None]
    assert torch.equal(model(ids, position_ids=positions).logits, model(ids).logits)
    for wrong in (70, -1):
        for call in (model, model.trace):
            with pytest.raises(ValueError, match=rf"position_ids: expected ids in \[0, 69\], got {wrong}"):
                call(input_ids=ids, position_ids=positions.index_fill(1, torch.tensor(3), wrong))
    for call in (model, model.trace, model.fixed_depth()):
        with pytest.raises(ValueError, match="a row may have 70 tokens in this model, got 71"):
            call(input_ids=torch.full((1, 71), 7))


@pytest.mark.parametrize("family", RECTANGULAR)
def test_holes_are_refused_by_families_that_read_distances(family):
    model = early_exit(family)
    with pytest.raises(ValueError, match=rf"padding at the ends of rows only.*layers of '{family}' read the distance"):
        model(**batch_for(model, "holes"))


#: Family and settings of its config that change its answers.
SETTINGS = [
    *(("modernbert", {"classifier_pooling": p, "classifier_bias": True, "norm_bias": True}) for p in ("cls", "mean")),
    *(("eurobert", {"classifier_pooling": p}) for p in ("bos", "mean", "late")),
    ("deberta-v2", {}),  # without a convolution, which is refused
]


@pytest.mark.parametrize(("family", "settings"), SETTINGS)
def test_models_do_what_their_config_says(family, settings):
    base = stock(family, **settings)
    batch = batch_for(base)
    assert (ee.to_early_exit(base)(**batch).logits - base(**batch).logits).abs().max() <= TOLERANCE
