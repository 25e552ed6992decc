"""Fused layers with norms first, rotary positions and a gated feed-forward: equality with the layers of the family."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from support.models import DEPTH, batch_for, kinds_of, stock
from torch import nn

import earlyexit_kernels as ee
from earlyexit_kernels.core.encoder import family_encoder
from earlyexit_kernels.core.inputs import check_inputs
from earlyexit_kernels.core.rows import embedded
from earlyexit_kernels.core.view import Inputs
from earlyexit_kernels.cpu import onednn
from earlyexit_kernels.criteria import Entropy
from earlyexit_kernels.errors import BackendUnavailableError

#: Difference between float32 results, relative to the largest value.
TOLERANCE = 3e-6
BIASES = {"attention_bias": True, "mlp_bias": True, "norm_bias": True}
every_family = pytest.mark.parametrize("family", ["modernbert", "eurobert"])
#: One row, equal rows, ragged rows, and rows longer than the window of 9 tokens.
BATCHES = ((1,), (30,), (5, 5, 5), (17, 3, 9, 12), (60, 2, 33, 34))
#: Largest number of tokens of packed products: all, none, and some.
PACKED_UP_TO = {"packed": math.inf, "torch": 0, "by size": 20}


def pair(family="modernbert", **sizes):
    """Return a stock model and two models on its weights, with the family's layers and with fused ones."""
    base = stock(family, **sizes)
    models = [ee.to_early_exit(base) for _ in range(2)]
    for model, kind in zip(models, ("eager", "fused"), strict=True):
        model.configure(path=kind)
    assert [model.explain().path for model in models] == ["eager", "fused"]
    return base, *models


def apart(got, expected) -> float:
    """Return the largest difference relative to the largest value."""
    return float((got - expected).detach().abs().max() / expected.detach().abs().max())


@torch.no_grad()
def states(model, batch):
    """Return the hidden states after each layer."""
    view = model.view()
    encoder = model.runner._encoder(view)
    inputs = check_inputs(Inputs(**batch), view.adapter, view.backbone)
    rows, _ = embedded(view, inputs, encoder.embed, with_keys=False)
    found = []
    for number, layer in enumerate(encoder.layers, start=1):
        rows.through(number, layer)
        found.append(rows.hidden[None])
    return found


@pytest.fixture(params=PACKED_UP_TO)
def products(request, monkeypatch):
    reason = onednn.onednn_unsupported_reason(torch.float32)
    if reason and request.param != "torch":
        pytest.skip(reason)
    changed = onednn.Products(PACKED_UP_TO[request.param], with_activation=False)
    monkeypatch.setattr(onednn, "PRODUCTS", dict.fromkeys(onednn.PRODUCTS, changed))


@pytest.mark.sample(4)
@pytest.mark.parametrize("sizes", [{}, BIASES], ids=["plain", "biases"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@every_family
def test_equals_the_layers_of_the_family(family, attention, sizes, products):
    base, own, fused = pair(family, attention=attention, **sizes)
    for lengths in BATCHES:
        kinds = kinds_of(family) if min(lengths) > 2 else ("full", "right")
        for kind in kinds:
            batch = batch_for(own, kind, lengths=lengths)
            after = zip(states(fused, batch), states(own, batch), strict=True)
            assert max(apart(got, expected) for got, expected in after) <= TOLERANCE
            assert apart(fused.trace(**batch).logits, own.trace(**batch).logits) <= TOLERANCE
            assert apart(fused(**batch).logits, base(**batch).logits) <= TOLERANCE


@every_family
def test_rows_leave_at_the_same_layers(family, products):
    _, own, fused = pair(family)
    for kind in kinds_of(family):
        batch = batch_for(own, kind)
        for threshold in (0.0, 0.9, 2.0):
            for model in (own, fused):
                model.set_criterion(Entropy(threshold=threshold))
            got, expected = fused(**batch), own(**batch)
            assert torch.equal(got.exit_layer, expected.exit_layer)
            assert apart(got.logits, expected.logits) <= TOLERANCE


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "relu", "silu", "swish", "linear"])
@pytest.mark.parametrize(("family", "name"), [("modernbert", "hidden_activation"), ("eurobert", "hidden_act")])
def test_activations(family, name, activation):
    _, own, fused = pair(family, **{name: activation})
    batch = batch_for(own)
    assert apart(fused.trace(**batch).logits, own.trace(**batch).logits) <= TOLERANCE


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float16, 4e-3), (torch.float64, 2e-6)])
@every_family
def test_other_dtypes(family, dtype, tolerance):
    _, own, fused = pair(family)
    batch = batch_for(own)
    own.to(dtype), fused.to(dtype)
    layer = fused.runner._encoder(fused.view()).layers[0]
    assert layer.qkv.weight.dtype == dtype
    assert (layer.qkv.packed is None) == bool(onednn.onednn_unsupported_reason(dtype))
    # traces are float32, so float64 layers agree up to float32 rounding
    assert apart(fused.trace(**batch).logits, own.trace(**batch).logits) <= tolerance


def test_layers_have_the_window_and_the_norms_of_their_own():
    _, _, fused = pair()
    layers = fused.runner._encoder(fused.view()).layers
    assert [layer.weights.window for layer in layers] == [None, 5, 5, None]
    assert [layer.weights.attention_norm is None for layer in layers] == [True, False, False, False]
    windowed = fused.trace(**batch_for(fused)).logits
    for layer in fused.backbone.layers:
        layer.attn.sliding_window = None
    assert apart(fused.trace(**batch_for(fused)).logits, windowed) > 1e-3


def test_only_products_are_copied():
    if reason := onednn.onednn_unsupported_reason(torch.float32):
        pytest.skip(reason)
    _, _, fused = pair(**BIASES)
    for own, layer in zip(fused.backbone.layers, fused.runner._encoder(fused.view()).layers, strict=True):
        linears = {layer.qkv: own.attn.Wqkv, layer.attention_out: own.attn.Wo}
        linears |= {layer.inner: own.mlp.Wi, layer.outer: own.mlp.Wo}
        for got, linear in linears.items():
            assert got.weight.data_ptr() == linear.weight.data_ptr() and got.bias.data_ptr() == linear.bias.data_ptr()
            assert got.packed.is_mkldnn and got.packed.shape == linear.weight.shape
        assert layer.weights.norm.weight.data_ptr() == own.mlp_norm.weight.data_ptr()
        assert not any(x.requires_grad for got in linears for x in (got.weight, got.bias))


@every_family
def test_without_onednn(family, monkeypatch):
    monkeypatch.setattr(onednn, "onednn_unsupported_reason", lambda dtype: "no such names")
    _, own, fused = pair(family)
    assert fused.runner._encoder(fused.view()).layers[0].qkv.packed is None
    batch = batch_for(own)
    assert apart(fused.trace(**batch).logits, own.trace(**batch).logits) <= TOLERANCE


@every_family
def test_copies_start_unpacked_and_agree(family, tmp_path):
    model = ee.to_early_exit(stock(family), criterion=Entropy(threshold=0.9))
    batch = batch_for(model)
    expected = model(**batch).logits
    assert model.explain().path == "fused" and len(model.runner.paths["fused"].layers._made) == DEPTH
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not twin.runner.paths["fused"].layers._made
        assert torch.equal(twin(**batch).logits, expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(ee.EarlyExitForSequenceClassification.from_pretrained(tmp_path)(**batch).logits, expected)


@every_family
@torch.no_grad()
def test_rows_that_are_not_numbers_do_not_affect_others(family):
    _, _, fused = pair(family)
    view, batch, found = fused.view(), batch_for(fused), []
    rows, _ = embedded(view, Inputs(**batch), family_encoder(view).embed, with_keys=False)
    start, end = rows.offsets[1:3].tolist()
    for value in (0.5, torch.nan):
        some = rows.with_hidden(rows.hidden.clone())
        some.hidden[start:end] = value
        for number, layer in enumerate(fused.runner._encoder(view).layers, start=1):
            some.through(number, layer)
        found.append(some.hidden)
    rest = torch.tensor([*range(start), *range(end, len(found[0]))])
    assert found[1][start:end].isnan().all() and torch.isfinite(found[0]).all()
    assert torch.equal(found[1][rest], found[0][rest])


class Adapted(nn.Linear):
    """A linear with an adapter, as adapter libraries insert it."""


def an_adapted_linear(layer) -> None:
    layer.attn.Wqkv = Adapted(64, 192, bias=False)


def lora(layer) -> None:
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["Wqkv"], init_lora_weights=False), layer)


def quantized(layer) -> None:
    torch.ao.quantization.quantize_dynamic(layer.mlp, {nn.Linear}, dtype=torch.qint8, inplace=True)


def a_module_more(layer) -> None:
    layer.mlp.adapter = nn.Linear(64, 64)


def another_norm(layer) -> None:
    layer.attn_norm = nn.RMSNorm(64)


def another_activation(layer) -> None:
    layer.mlp.act = nn.Softmax(dim=1)


def an_activation_with_a_weight(layer) -> None:
    layer.mlp.act = nn.PReLU()


def a_hook(layer) -> None:
    layer.mlp.Wi.register_forward_hook(lambda module, inputs, output: output + 1)


def another_forward(layer) -> None:
    layer.attn.forward = layer.attn.forward


def causal(layer) -> None:
    layer.attn.is_causal = True


def another_scale(layer) -> None:
    layer.attn.scaling = 1.0


OWN_WAYS = {
    an_adapted_linear: "attn.Wqkv (Adapted) is not a plain Linear",
    lora: "attn.Wqkv (Linear) is not a plain Linear",
    quantized: "mlp.Wi (Linear) is not a plain Linear",
    a_module_more: "mlp.adapter (Linear) is not supported",
    another_norm: "attn_norm (RMSNorm) is not a plain LayerNorm",
    another_activation: "mlp.act (Softmax) is not one of the activations of transformers without weights",
    an_activation_with_a_weight: "mlp.act (PReLU) is not one of the activations of transformers without weights",
    a_hook: "mlp.Wi (Linear) has a forward hook",
    another_forward: "attn (ModernBertAttention) has a forward hook",
    causal: "attn (ModernBertAttention) is causal",
    another_scale: "attn (ModernBertAttention) scales by 1, expected 1 / sqrt(16)",
}


@pytest.mark.parametrize("change", OWN_WAYS, ids=lambda change: change.__name__)
@pytest.mark.parametrize("packed", [False, True], ids=["before", "after"])
def test_unsupported_layer_runs_unfused(change, packed):
    model = ee.to_early_exit(stock("modernbert"))
    batch = batch_for(model)
    if packed:
        assert model.explain().path == "fused"
        model(**batch)
    change(model.backbone.layers[2])
    own = copy.deepcopy(model)
    own.configure(path="eager")
    assert apart(model.trace(**batch).logits, own.trace(**batch).logits) <= TOLERANCE
    assert OWN_WAYS[change] in model.explain().reason
    with pytest.raises(BackendUnavailableError, match="use 'auto' or 'eager'") as error:
        model.configure(path="fused")
    assert OWN_WAYS[change] in str(error.value)


#: Settings with which the family's layer raises an error -> words of the reason against the fused layer.
BROKEN = {
    "window": (lambda layer: setattr(layer.attn, "sliding_window", 0), "sliding_window 0, expected None or at least 1"),
    "heads": (lambda layer: setattr(layer.attn, "head_dim", 15), "head_dim 15, expected a divisor of a third of 192"),
    "out": (lambda layer: setattr(layer.attn, "Wo", nn.Linear(64, 32)), "shape [32, 64], expected [64, 64]"),
    "inner": (lambda layer: setattr(layer.mlp, "Wi", nn.Linear(64, 191)), "shape [191, 64], expected [190, 64]"),
    "outer": (lambda layer: setattr(layer.mlp, "Wo", nn.Linear(96, 32)), "shape [32, 96], expected [64, 96]"),
}


@pytest.mark.parametrize("setting", BROKEN)
def test_errors_are_those_of_the_family(setting):
    change, words = BROKEN[setting]
    model = ee.to_early_exit(stock("modernbert"))
    model(**batch_for(model))
    change(model.backbone.layers[1])
    assert words in model.explain().reason
    with pytest.raises((RuntimeError, ValueError)):
        model(**batch_for(model))


@every_family
def test_gates_run_a_layer_on_some_rows(family):
    """Rows that a gate lets run are gathered, with the positions that they have in the request."""
    model = ee.to_early_exit(stock(family), method="smartbert")
    batch = batch_for(model)
    for gate in model.heads.gates:
        nn.init.normal_(gate.out.weight, std=3.0)
    model.set_criterion(ee.criteria.SkipGate(threshold=0.5, exit=ee.criteria.FullDepth()))
    got = model(**batch)
    assert model.explain().path == "fused" and len(got.layers_run.unique()) > 1
    model.configure(path="eager")
    expected = model(**batch)
    assert torch.equal(got.layers_run, expected.layers_run)
    assert apart(got.logits, expected.logits) <= TOLERANCE
