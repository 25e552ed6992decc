"""Fused layers of EuroBERT: linears side by side, key and value with fewer heads, norms by the mean square."""

from __future__ import annotations

import copy

import pytest
import torch
from core.test_fused_gated import TOLERANCE, apart, pair
from support.models import batch_for, stock, varied_entropy
from torch import nn

import earlyexit_kernels as ee
from earlyexit_kernels.backbones.forms_gated import RootMeanSquare
from earlyexit_kernels.errors import BackendUnavailableError

#: Heads of query -> heads of key and value.
HEADS = [(4, 4), (4, 2), (4, 1), (8, 2)]
LENGTHS = (17, 3, 9, 12, 30, 1)


@pytest.mark.parametrize(("heads", "shared"), HEADS)
def test_heads_that_share_keys_and_values(heads, shared):
    base, own, fused = pair("eurobert", num_attention_heads=heads, num_key_value_heads=shared, attention_bias=True)
    batch = batch_for(own, lengths=LENGTHS)
    (layer, *_) = fused.runner._encoder(fused.view()).layers
    assert layer.weights.heads == heads and layer.qkv.weight.shape[0] == (heads + 2 * shared) * 64 // heads
    assert apart(fused.trace(**batch).logits, own.trace(**batch).logits) <= TOLERANCE
    assert apart(fused(**batch).logits, base(**batch).logits) <= TOLERANCE


def test_heads_that_are_wider_than_the_model():
    base, _, fused = pair("eurobert", head_dim=24)
    batch = batch_for(base, lengths=LENGTHS)
    assert apart(fused(**batch).logits, base(**batch).logits) <= TOLERANCE


@pytest.mark.parametrize("pooling", ["bos", "mean", "late"])
def test_close_to_float64(pooling):
    base, own, fused = pair("eurobert", classifier_pooling=pooling, attention_bias=True, mlp_bias=True)
    batch = batch_for(own, lengths=LENGTHS)
    got, family = fused.trace(**batch).logits, own.trace(**batch).logits
    double = ee.to_early_exit(copy.deepcopy(base).double())
    double.configure(path="eager")
    exact = double.trace(**batch).logits
    assert apart(got, exact) <= max(2 * apart(family, exact), 1e-6)


@pytest.mark.parametrize("pooling", [None, "first", "mean"])
def test_a_row_does_not_depend_on_its_batch(pooling):
    model = ee.to_early_exit(stock("eurobert"), pooling=pooling)
    batch = batch_for(model, lengths=(3, 20, 5, 8, 11, 19, 10, 17))
    model.set_criterion(varied_entropy(model.trace(**batch)))
    assert model.explain().path == "fused"
    for compaction in ("always", "never"):
        model.configure(compaction=compaction)
        expected = model(**batch)
        assert len(expected.exit_layer.unique()) > 1
        for rows in ([5], [2, 7, 0], [7, 6, 5, 4, 3, 2, 1, 0]):
            got = model(**{name: x[rows] for name, x in batch.items()})
            assert torch.equal(got.exit_layer, expected.exit_layer[rows])
            assert apart(got.logits, expected.logits[rows]) <= TOLERANCE


def test_linears_side_by_side_are_copied():
    _, _, fused = pair("eurobert", attention_bias=True, mlp_bias=True)
    own, layer = fused.backbone.layers[1], fused.runner._encoder(fused.view()).layers[1]
    query, key, value = own.self_attn.q_proj, own.self_attn.k_proj, own.self_attn.v_proj
    for name in ("weight", "bias"):
        joined = torch.cat([getattr(linear, name) for linear in (query, key, value)])
        assert torch.equal(getattr(layer.qkv, name), joined)
        joined = torch.cat([getattr(linear, name) for linear in (own.mlp.gate_proj, own.mlp.up_proj)])
        assert torch.equal(getattr(layer.inner, name), joined)
    assert layer.outer.weight.data_ptr() == own.mlp.down_proj.weight.data_ptr()
    norm = layer.weights.norm
    assert isinstance(norm, RootMeanSquare) and norm.eps == 1e-5
    assert norm.weight.data_ptr() == own.post_attention_layernorm.weight.data_ptr()


def test_a_bias_of_one_of_several_linears():
    _, own, fused = pair("eurobert")
    for model in (own, fused):
        model.backbone.layers[1].self_attn.k_proj.bias = nn.Parameter(torch.linspace(-1, 1, 32))
        model.backbone.layers[2].mlp.up_proj.bias = nn.Parameter(torch.linspace(-1, 1, 96))
    batch = batch_for(own)
    assert fused.explain().path == "fused"
    assert apart(fused.trace(**batch).logits, own.trace(**batch).logits) <= TOLERANCE


PARTS = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("path", PARTS)
def test_a_write_to_any_linear_is_seen(path, name):
    _, own, fused = pair("eurobert", attention_bias=True, mlp_bias=True)
    batch = batch_for(own)
    before = fused.trace(**batch).logits
    getattr(fused.backbone.layers[1].get_submodule(path), name).data.mul_(-1.5)  # which both models share
    got, expected = fused.trace(**batch).logits, own.trace(**batch).logits
    assert apart(got, expected) <= TOLERANCE
    assert apart(expected, before) > 1e-4, "a stale answer would not be detected"


def another_norm(layer) -> None:
    layer.input_layernorm = nn.RMSNorm(64)


def a_norm_of_another_class(layer) -> None:
    layer.input_layernorm.__class__ = type("EuroBertRMSNorm", (type(layer.input_layernorm),), {"__module__": "own"})


def a_bias_of_a_norm(layer) -> None:
    layer.input_layernorm.bias = nn.Parameter(torch.zeros(64))


def a_norm_within_heads(layer) -> None:
    layer.self_attn.q_norm = nn.LayerNorm(16)


def causal(layer) -> None:
    layer.self_attn.is_causal = True


def soft_capped(layer) -> None:
    layer.self_attn.attn_logit_softcapping = 2.0


WAYS = {
    another_norm: "input_layernorm (RMSNorm) is not a plain LayerNorm",
    a_norm_of_another_class: "input_layernorm (EuroBertRMSNorm) is not a plain LayerNorm",
    a_bias_of_a_norm: "input_layernorm (EuroBertRMSNorm) is not a plain LayerNorm",
    a_norm_within_heads: "self_attn.q_norm (LayerNorm) is not supported",
    causal: "self_attn (EuroBertAttention) is causal",
    soft_capped: "self_attn (EuroBertAttention) has attn_logit_softcapping 2.0, which layers of this form do not",
}


@pytest.mark.parametrize("change", WAYS, ids=lambda change: change.__name__)
def test_unsupported_layer_runs_unfused(change):
    _, own, fused = pair("eurobert")
    batch = batch_for(own)
    fused.configure(path="auto")
    fused.trace(**batch)
    for model in (own, fused):
        change(model.backbone.layers[2])
    reason = f"they are supported and faster, except in layer 3: {WAYS[change]}"
    assert fused.explain()[:2] == ("fused", reason)
    assert apart(fused.trace(**batch).logits, own.trace(**batch).logits) <= TOLERANCE
    with pytest.raises(BackendUnavailableError, match="use 'auto' or 'eager'"):
        fused.configure(path="fused")


def linear(path, inputs, outputs):
    def change(layer):
        layer.set_submodule(path, nn.Linear(inputs, outputs))

    return change


#: Settings with which the family's layer raises an error -> words of the reason against the fused layer.
BROKEN = {
    "width of heads": (
        lambda layer: vars(layer.self_attn).update(head_dim=15, scaling=15**-0.5),
        "head_dim 15, and query, key and value of [64, 32, 32], expected whole heads",
    ),
    "heads of the value": (linear("self_attn.v_proj", 64, 48), "query, key and value of [64, 32, 48]"),
    "inputs of the key": (linear("self_attn.k_proj", 48, 32), "shape [32, 48], expected [32, 64]"),
    "output": (linear("self_attn.o_proj", 48, 64), "shape [64, 48], expected [64, 64]"),
    "second half": (linear("mlp.up_proj", 64, 95), "shape [95, 64], expected [96, 64]"),
    "outer": (linear("mlp.down_proj", 95, 64), "shape [64, 95], expected [64, 96]"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_errors_are_those_of_the_family(name):
    change, words = BROKEN[name]
    model = ee.to_early_exit(stock("eurobert"))
    change(model.backbone.layers[1])
    batch = batch_for(model)
    assert words in model.explain().reason
    with pytest.raises((RuntimeError, ValueError)):
        model(**batch)
