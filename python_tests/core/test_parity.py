"""Parity with the stock model at full depth: logits, and hidden states under left padding."""

from __future__ import annotations

import pytest
import torch
from support.models import (
    ALL_FAMILIES,
    DECODERS,
    DEPTH,
    RECTANGULAR,
    batch_for,
    encoder_of,
    holes_of,
    kinds_of,
    stock,
)

import earlyexit_kernels as ee

TOLERANCE = 1e-5


@pytest.mark.sample(2)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_never_exit_logits_equal_stock(family):
    base = stock(family)
    model = ee.to_early_exit(base)
    worst = 0.0
    for kind in kinds_of(family):
        for seed, lengths in enumerate([(17, 3, 9, 12), (1, 2), (30, 4, 4, 29, 16, 5, 5)]):
            if kind in ("holes", "pad_ids_attended") and min(lengths) < 3:
                continue
            batch = batch_for(base, kind, lengths=lengths, seed=seed)
            with torch.inference_mode():
                expected, got = base(**batch).logits, model(**batch).logits
            assert expected.std() > 0.05 or len(lengths) == 1
            worst = max(worst, (got - expected).abs().max().item())
    assert worst <= TOLERANCE


UNUSUAL = [
    ("albert", {"num_hidden_groups": 1}),
    ("albert", {"num_hidden_groups": 4, "inner_group_num": 2}),
    ("albert", {"num_hidden_groups": 3, "num_hidden_layers": 7}),
    ("electra", {"embedding_size": 64}),
    ("distilbert", {"sinusoidal_pos_embds": True}),
    ("bert", {"hidden_act": "relu", "num_hidden_layers": 1}),
]


@pytest.mark.parametrize(("family", "sizes"), UNUSUAL)
def test_unusual_sizes(family, sizes):
    base = stock(family, **sizes)
    model = ee.to_early_exit(base)
    assert model.depth == sizes.get("num_hidden_layers", DEPTH)
    batch = batch_for(base, "holes")
    assert (model(**batch).logits - base(**batch).logits).abs().max() <= TOLERANCE


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_token_types_and_positions_without_a_mask(family):
    base = stock(family)
    model = ee.to_early_exit(base)
    ids = batch_for(base, "full")["input_ids"]
    given = {"input_ids": ids}
    variants = [given]
    if family not in ("distilbert", "deberta-v2"):  # which has relative positions only
        positions = (torch.arange(17) * 2 + 3).expand(4, -1)
        variants += [{**given, "position_ids": positions}, {**given, "position_ids": positions[:1]}]
    if family in ("bert", "albert", "electra"):
        types = (torch.arange(17) > 6).long().expand(4, -1)
        variants += [{**given, "token_type_ids": types}, {**given, "token_type_ids": types[:1]}]
    for variant in variants:
        assert (model(**variant).logits - base(**variant).logits).abs().max() <= TOLERANCE
    changed = [(model(**variant).logits - model(**given).logits).abs().max() > 1e-3 for variant in variants[1:]]
    assert all(changed)


@pytest.mark.sample(4)
@pytest.mark.parametrize("pooling", ["mean", None])
@pytest.mark.parametrize("family", [family for family in ALL_FAMILIES if family not in RECTANGULAR])
def test_hidden_states_of_attended_tokens_equal_stock(family, pooling):
    base = stock(family)
    model = ee.to_early_exit(base, pooling=pooling)
    seen = []
    for layer in dict.fromkeys(model.adapter.layers(model.backbone)):
        layer.register_forward_hook(lambda *call: seen.append(call[-1][0] if isinstance(call[-1], tuple) else call[-1]))
    worst = 0.0
    # of a row that ends in attended padding, exits of decoders read the last token before
    kinds = [kind for kind in kinds_of(family) if kind != "pad_ids_attended" or family not in DECODERS]
    for kind in (*kinds, *(["left"] if pooling == "mean" else [])):
        batch = batch_for(base, kind)
        with torch.inference_mode():
            expected = encoder_of(base)(**batch, output_hidden_states=True).hidden_states[1:]
        seen.clear()
        model.trace(**batch)
        attended = batch["attention_mask"].bool()
        assert len(seen) == len(expected) == DEPTH
        norm = model.adapter.exit_norm(model.backbone)
        if norm is not None:
            seen[-1] = norm(seen[-1])
        for ours, theirs in zip(seen, expected, strict=True):
            assert ours.shape == (1, *theirs[attended].shape)
            worst = max(worst, (ours[0] - theirs[attended]).abs().max().item())
    assert worst <= TOLERANCE


@pytest.mark.sample(3)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_mean_pooling_is_the_mean_of_attended_tokens(family):
    base = stock(family)
    model = ee.to_early_exit(base, pooling="mean")
    for kind in ("right", "left", holes_of(family)):
        batch = batch_for(base, kind)
        last = encoder_of(base)(**batch).last_hidden_state
        mask = batch["attention_mask"][:, :, None]
        expected = model.heads.out[-1]((last * mask).sum(1) / mask.sum(1))
        assert (model(**batch).logits - expected).abs().max() <= TOLERANCE


@pytest.mark.sample(2)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_packed_attention_without_a_plan_is_sdpa(family):
    """`model.backbone` alone computes the stock encoder, padding mask included."""
    base = stock(family)
    model = ee.to_early_exit(base)
    for kind in ("right", "left", "holes"):
        batch = batch_for(base, kind)
        got, expected = (m(**batch).last_hidden_state for m in (model.backbone, encoder_of(base)))
        attended = batch["attention_mask"].bool()
        assert torch.equal(got, expected) or (family == "gemma2" and (got - expected)[attended].abs().max() <= 1e-6)


def test_the_mean_of_a_model_in_half_precision_is_not_rounded():
    """Where a norm lies between the layers and the exits, as in a trace."""
    model = ee.to_early_exit(stock("modernbert").to(torch.bfloat16), pooling="mean")
    batch = batch_for(model)
    assert (model(**batch).logits - model.trace(**batch).logits[:, -1]).abs().max() <= TOLERANCE
