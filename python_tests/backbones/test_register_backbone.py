"""Backbones that users register: converted, saved and loaded like the package's own, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.models import batch_for, stock

import earlyexit_kernels as ee
from earlyexit_kernels import backbones
from earlyexit_kernels.backbones import BACKBONES, BackboneAdapter, StockHead
from earlyexit_kernels.tuning.flops import encoder_macs

ERNIE = BackboneAdapter(
    model_type="ernie",
    base="ernie",
    head=StockHead(dense="ernie.pooler.dense"),
    embed=backbones.embed_with_types,
    layers=backbones.encoder_layers,
    positions=backbones.column_positions,
    longest=backbones.position_limit,
)


@pytest.fixture
def ernie():
    yield backbones.register(ERNIE)
    BACKBONES.pop("ernie", None)


def test_a_registered_family_is_converted_saved_and_loaded(ernie, tmp_path):
    """By the layers of the family and by fused ones; without its adapter a folder says what to do."""
    base = stock("ernie")
    model, batch = ee.to_early_exit(base), batch_for(base)
    for layers in ("eager", "fused"):
        model.configure(path=layers)
        assert torch.allclose(model(**batch).logits, base(**batch).logits, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = ee.EarlyExitForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    BACKBONES.pop("ernie")
    with pytest.raises(ValueError, match=r"'ernie' has no adapter; supported are .*backbones\.register"):
        ee.EarlyExitForSequenceClassification.from_pretrained(tmp_path)


def test_a_model_type_has_one_adapter(ernie):
    assert backbones.register(dataclasses.replace(ERNIE)) == ERNIE
    for other in (dataclasses.replace(ERNIE, base="bert"), dataclasses.replace(ERNIE, model_type="bert")):
        with pytest.raises(ValueError, match=f"model_type '{other.model_type}' has another adapter already"):
            backbones.register(other)
    assert BACKBONES["ernie"] == ERNIE and BACKBONES["bert"].base == "bert"


REFUSED = {
    "model_type": ("", "a non-empty string, got ''"),
    "base": (None, "a non-empty string, got None"),
    "head": ("classifier", "a StockHead, got 'classifier'"),
    "embed": (None, "a function, got None"),
    "layers": ([], r"a function, got \[\]"),
    "positions": (0, "a function, got 0"),
    "longest": (512, "a function, got 512"),
    "names": ({}, "a LayerNames, a GatedLayerNames or None, got {}"),
    "parts": (None, "a function, got None"),
    "shares_layers": (1, "True or False, got 1"),
    "widen": (None, "a function, got None"),
    "exit_norm": (None, "a function, got None"),
    "layer_arguments": ({}, "a function or None, got {}"),
    "rectangle_arguments": (0, "a function or None, got 0"),
    "beside_layers": (None, "a function, got None"),
    "window": (64, "a function or None, got 64"),
    "embeddings": (b"embeddings", "a non-empty string, got b'embeddings'"),
}


def test_wrong_fields_are_refused():
    assert set(REFUSED) == {field.name for field in dataclasses.fields(BackboneAdapter)}
    for field, (value, words) in REFUSED.items():
        with pytest.raises(ValueError, match=f"register: expected {field} of the adapter to be {words}"):
            backbones.register(dataclasses.replace(ERNIE, **{field: value}))
        assert "ernie" not in BACKBONES
    with pytest.raises(TypeError, match="register: expected a BackboneAdapter, got 'ernie'"):
        backbones.register("ernie")


def test_the_multiply_adds_of_a_registered_family_are_those_of_its_layers():
    """A feed-forward part with a gate has three products; its name is on no list."""
    backbones.register(dataclasses.replace(BACKBONES["llama"], model_type="helium"))
    try:
        model = ee.to_early_exit(stock("helium", num_key_value_heads=2, head_dim=16, pad_token_id=0))
    finally:
        BACKBONES.pop("helium")
    width, inner = model.config.backbone_config.hidden_size, model.config.backbone_config.intermediate_size
    expected = (2 + 1) * width * width + 3 * width * inner  # queries and output; keys and values of half the heads
    assert model._layer_macs == expected
    assert encoder_macs(model, torch.tensor([1]), 1).tolist() == [expected + 2 * width]
