"""Conversion refuses an adapter whose layers let the rows of a batch affect each other."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.models import ALL_FAMILIES, batch_for, stock

import earlyexit_kernels as ee
from earlyexit_kernels.backbones import BACKBONES, StockHead
from earlyexit_kernels.hf import convert


class MixedByMean(torch.nn.Module):
    """A layer that adds the mean of all tokens to each."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden, plan):
        return self.inner(hidden, plan=plan)[0] + hidden.mean(dim=1, keepdim=True)


def test_a_layer_that_mixes_rows_is_refused():
    base = stock()
    layers = base.bert.encoder.layer
    layers[2] = MixedByMean(layers[2])
    with pytest.raises(
        ValueError, match=r"adapter of 'bert' does not fit: the rows of a batch affect each other in Mix"
    ):
        ee.to_early_exit(base)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("mpnet", "the rows of a batch affect each other in MPNetLayer.*rectangle_arguments"),
        ("deberta-v2", "DebertaV2Layer cannot run on packed rows: .*plan"),
        ("llama", "LlamaDecoderLayer cannot run on packed rows"),
    ],
)
def test_an_adapter_of_names_alone_is_refused(family, message, monkeypatch):
    """MPNet takes the plan and ignores it, DeBERTa does not take it, Llama lacks its rotary embeddings."""
    names_only = dataclasses.replace(BACKBONES[family], rectangle_arguments=None, layer_arguments=None)
    monkeypatch.setitem(BACKBONES, family, names_only)
    with pytest.raises(ValueError, match=rf"adapter of '{family}' does not fit: {message}"):
        ee.to_early_exit(stock(family))


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_family_fits_in_train_mode_and_half_precision(family):
    base = stock(family, dropout=0.5).train()
    model = ee.to_early_exit(base)
    assert model.training and all(module.training for module in model.modules())
    model = ee.to_early_exit(stock(family).to(torch.bfloat16))
    assert torch.isfinite(model(**batch_for(model)).logits).all()


def test_the_check_draws_no_random_numbers(monkeypatch):
    states = []
    for check in (convert.check_separation, lambda view: None):
        monkeypatch.setattr(convert, "check_separation", check)
        torch.manual_seed(3)
        ee.to_early_exit(stock(dropout=0.5).train())
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_a_causal_family_that_reads_the_first_token_is_refused(monkeypatch):
    head = dataclasses.replace(BACKBONES["llama"].head, pooling="first")
    monkeypatch.setitem(BACKBONES, "llama", dataclasses.replace(BACKBONES["llama"], head=head))
    with pytest.raises(ValueError, match=r"layers are causal.*give its StockHead pooling='last'"):
        ee.to_early_exit(stock("llama"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": "modle"}, "the adapter of 'llama' does not fit LlamaForSequenceClassification, which has no modle"),
        ({"head": StockHead(dense=None, pooling="last")}, "which has no classifier"),
        ({"embeddings": "embeddings"}, "the adapter of 'llama' does not fit LlamaModel: .*embeddings"),
        ({"exit_norm": lambda backbone: backbone.final}, "the adapter of 'llama' does not fit LlamaModel: .*final"),
    ],
)
def test_wrong_names_are_told(changes, message, monkeypatch):
    monkeypatch.setitem(BACKBONES, "llama", dataclasses.replace(BACKBONES["llama"], **changes))
    with pytest.raises(ValueError, match=message):
        ee.to_early_exit(stock("llama"))


def test_an_unknown_pooling_is_refused_at_once():
    with pytest.raises(ValueError, match=r"StockHead\(pooling=...\): expected one of .*, got 'tail'"):
        StockHead(dense=None, pooling="tail")
