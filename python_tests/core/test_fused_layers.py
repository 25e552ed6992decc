"""Fused encoder layers: equality with the family's layers, changes of weights, and unsupported layers."""

from __future__ import annotations

import copy
import logging
import math
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.utils.mkldnn
from support.models import ATTENDED, FAMILIES, batch_for, stock
from torch import nn

import earlyexit_kernels as ee
from earlyexit_kernels.core.attention_plan import plan_attention
from earlyexit_kernels.core.packing import pack
from earlyexit_kernels.cpu import layers, onednn
from earlyexit_kernels.cpu.bert import BertLayer, OneDnnLayer
from earlyexit_kernels.criteria import Entropy
from earlyexit_kernels.errors import BackendUnavailableError

#: Kinds of products: all packed by oneDNN, with fused activation, all of torch, and only small ones packed.
PRODUCTS = {
    "packed": onednn.Products(math.inf, with_activation=False),
    "with activation": onednn.Products(math.inf, with_activation=True),
    "torch": onednn.Products(0, with_activation=True),
    "by size": onednn.Products(20, with_activation=True),
}
#: The vector kernels of the package, which replace those products.
KERNELS = "kernels"


def pair(family="bert", **sizes):
    """Return two models on the same weights, with the family's layers and with fused ones."""
    base = stock(family, **sizes)
    models = [ee.to_early_exit(base) for _ in range(2)]
    for model, kind in zip(models, ("eager", "fused"), strict=True):
        model.configure(path=kind)
    assert [model.explain().path for model in models] == ["eager", "fused"]
    return models


def assert_alike(own, fused, batch, *, atol=2e-5, rtol=1e-4) -> None:
    torch.testing.assert_close(fused.trace(**batch).logits, own.trace(**batch).logits, atol=atol, rtol=rtol)


def leave_out_kernels(monkeypatch) -> None:
    """Have fused layers run on the products of oneDNN and torch."""
    monkeypatch.setattr(layers, "kernels_unsupported_reason", lambda *dtypes: "they are left out")


@pytest.fixture(params=(*PRODUCTS, KERNELS))
def products(request, monkeypatch):
    if request.param == KERNELS:
        if reason := layers.kernels_unsupported_reason(torch.float32):
            pytest.skip(reason)
        return
    leave_out_kernels(monkeypatch)
    reason = onednn.onednn_unsupported_reason(torch.float32)
    if reason and request.param != "torch":
        pytest.skip(reason)
    monkeypatch.setattr(onednn, "PRODUCTS", dict.fromkeys(onednn.PRODUCTS, PRODUCTS[request.param]))


@pytest.mark.sample(4)
@pytest.mark.parametrize("family", FAMILIES)
def test_families_and_products(family, products):
    own, fused = pair(family)
    for kind in ATTENDED:
        batch = batch_for(own, kind)
        assert_alike(own, fused, batch)
        for threshold in (0.0, 0.9, 2.0):
            for model in (own, fused):
                model.set_criterion(Entropy(threshold=threshold))
            ours, theirs = fused(**batch), own(**batch)
            assert torch.equal(ours.exit_layer, theirs.exit_layer)
            torch.testing.assert_close(ours.logits, theirs.logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("products", PRODUCTS, indirect=True)
@torch.no_grad()
def test_the_extension_runs_the_same_steps(products, dtype):
    if reason := ee.available_backends("cpu")["cpp"]:
        pytest.skip(reason)
    model = ee.to_early_exit(stock()).to(dtype)
    for kind in ATTENDED:
        (mask, ids) = (batch_for(model, kind)[name] for name in ("attention_mask", "input_ids"))
        rows = pack(ids, mask)
        plan, x = plan_attention(rows), torch.randn(1, int(rows.offsets[-1]), 64).to(dtype)
        for fused in model.runner._encoder(model.view()).layers:
            assert type(fused) is OneDnnLayer
            torch.testing.assert_close(fused(x, plan=plan), fused.layer(x, plan=plan), atol=0, rtol=0)


def test_without_the_extension(monkeypatch):
    monkeypatch.setattr(layers, "available_backends", lambda device: {"cpp": "left out"})
    leave_out_kernels(monkeypatch)
    own, fused = pair()
    assert type(fused.runner._encoder(fused.view()).layers[0]) is BertLayer
    assert_alike(own, fused, batch_for(own))


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu"])
def test_activations(activation, products):
    own, fused = pair("bert", hidden_act=activation)
    assert_alike(own, fused, batch_for(own))


def test_layers_shared_by_groups(products):
    own, fused = pair("albert", inner_group_num=2)
    assert_alike(own, fused, batch_for(own))
    assert len({id(layer) for layer in fused.runner._encoder(fused.view()).layers}) == 2, "each group is packed once"


@pytest.mark.parametrize(("dtype", "atol"), [(torch.bfloat16, 0.15), (torch.float16, 2e-2), (torch.float64, 1e-10)])
def test_other_dtypes(dtype, atol):
    own, fused = pair()
    batch = batch_for(own)
    own.to(dtype), fused.to(dtype)
    assert fused.runner._encoder(fused.view()).layers[0].layer.qkv.weight.dtype == dtype
    # traces are float32, so float64 layers agree up to float32 rounding
    assert_alike(own, fused, batch, atol=max(atol, 2e-6), rtol=0.0)
    assert torch.isfinite(fused(**batch).logits).all()


def an_in_place_write(layer) -> None:
    with torch.no_grad():
        layer.intermediate.dense.weight.mul_(1.5)


def a_step_of_an_optimizer(layer) -> None:
    weight = layer.attention.self.key.weight
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.05).step()


def a_loaded_state(layer) -> None:
    layer.load_state_dict({name: tensor * 1.1 for name, tensor in layer.state_dict().items()})


def another_tensor(layer) -> None:
    layer.output.dense.weight.data = layer.output.dense.weight.data * 2


def another_parameter(layer) -> None:
    layer.output.dense.bias = nn.Parameter(torch.linspace(-1, 1, 64))


def another_module(layer) -> None:
    layer.output.LayerNorm = nn.LayerNorm(64)


CHANGES = (
    an_in_place_write,
    a_step_of_an_optimizer,
    a_loaded_state,
    another_tensor,
    another_parameter,
    another_module,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_weight_is_detected(change):
    own, fused = pair()
    batch = batch_for(own)
    before = fused.trace(**batch).logits
    for model in (own, fused):
        layer = model.backbone.encoder.layer[1]
        if change is not an_in_place_write or model is own:  # the two models share their parameters
            change(layer)
    assert_alike(own, fused, batch)
    assert not torch.allclose(fused.trace(**batch).logits, before, atol=1e-3)


def test_undetected_change_requires_refresh():
    own, fused = pair()
    batch = batch_for(own)
    fused.trace(**batch)
    own.backbone.encoder.layer[0].output.dense.weight.data.mul_(3)
    fused.configure(path="fused")
    assert_alike(own, fused, batch)


def test_train_mode_drops_the_copies_and_runs_family_layers():
    model = ee.to_early_exit(stock(), pooling="first")
    batch = batch_for(model)
    model(**batch)
    assert model.runner.paths["fused"].layers._made
    model.train()
    assert not model.runner.paths["fused"].layers._made
    out = model(**batch, labels=torch.zeros(4, dtype=torch.long))
    out.loss.backward()
    assert model.backbone.encoder.layer[0].output.dense.weight.grad is not None
    assert not model.runner.paths["fused"].layers._made


class Adapted(nn.Linear):
    """A linear with an adapter, as adapter libraries insert it."""


def an_adapted_linear(layer) -> None:
    layer.attention.self.query = Adapted(64, 64)


def a_linear_without_bias(layer) -> None:
    layer.output.dense = nn.Linear(96, 64, bias=False)


def a_module_more(layer) -> None:
    layer.output.adapter = nn.Linear(64, 64)


def another_activation(layer) -> None:
    layer.intermediate.intermediate_act_fn = nn.SiLU()


class ReLU(nn.Module):
    """Not the activation of torch that has this name."""

    def forward(self, x):
        return 2 * x.relu()


def an_activation_of_a_known_name(layer) -> None:
    layer.intermediate.intermediate_act_fn = ReLU()


class Doubling(nn.Dropout):
    """A dropout that does something in eval mode."""

    def forward(self, x):
        return 2 * x


def another_dropout(layer) -> None:
    layer.output.dropout = Doubling()


def a_hook(layer) -> None:
    layer.attention.output.dense.register_forward_hook(lambda module, inputs, output: output + 1)


def another_forward(layer) -> None:
    layer.output.forward = layer.output.forward


def a_scripted_linear(layer) -> None:
    layer.output.dense = torch.jit.script(layer.output.dense)


OWN_WAYS = {
    a_scripted_linear: "output.dense (RecursiveScriptModule) has a forward hook",
    an_adapted_linear: "query (Adapted) is not a plain Linear",
    a_linear_without_bias: "output.dense (Linear) is not a plain Linear with weight and bias",
    a_module_more: "output.adapter (Linear) is not supported",
    another_activation: "intermediate.intermediate_act_fn (SiLU) is not one of the activations",
    an_activation_of_a_known_name: "intermediate.intermediate_act_fn (ReLU) is not one of the activations",
    another_dropout: "output.dropout (Doubling) is not supported",
    a_hook: "attention.output.dense (Linear) has a forward hook",
    another_forward: "output (BertOutput) has a forward hook",
}


@pytest.mark.parametrize("change", OWN_WAYS, ids=lambda change: change.__name__)
@pytest.mark.parametrize("packed", [False, True], ids=["before", "after"])
def test_unsupported_layer_runs_unfused(change, packed, caplog):
    """Changed before or after packing: 'auto' runs the family's layer there, 'fused' raises with the reason."""
    model = ee.to_early_exit(stock(), pooling="first")
    batch = batch_for(model)
    if packed:
        assert model.explain().path == "fused"
        model(**batch)
    change(model.backbone.encoder.layer[2])
    own = copy.deepcopy(model)
    own.configure(path="eager")
    with caplog.at_level(logging.INFO, "earlyexit_kernels"):
        assert_alike(own, model, batch)
        model(**batch)
    runs = model.runner._encoder(model.view()).layers
    assert [run is layer for run, layer in zip(runs, model.view().layers, strict=True)] == [False, False, True, False]
    reason = model.explain().reason
    assert reason.startswith("they are supported and faster, except in layer 3: ") and OWN_WAYS[change] in reason
    assert sum(OWN_WAYS[change] in record.message for record in caplog.records) == 1, caplog.records
    with pytest.raises(BackendUnavailableError, match="use 'auto' or 'eager'") as error:
        model.configure(path="fused")
    assert OWN_WAYS[change] in str(error.value)
    assert model.explain().path == "fused"


def test_scripted_linear_runs_unfused():
    """The parameter tables of a scripted module are not dicts."""
    model = ee.to_early_exit(stock(), pooling="first")
    layer = model.backbone.encoder.layer[0]
    layer.output.dense = torch.utils.mkldnn.MkldnnLinear(layer.output.dense, torch.float)
    assert "output.dense (MkldnnLinear)" in model.explain().reason


def test_change_to_an_unsupported_layer_raises_under_fused():
    model = ee.to_early_exit(stock(), pooling="first")
    model.configure(path="fused")
    model(**batch_for(model))
    a_hook(model.backbone.encoder.layer[0])
    with pytest.raises(BackendUnavailableError, match="forward hook"):
        model(**batch_for(model))


def test_unknown_kind_is_refused():
    model = ee.to_early_exit(stock(), pooling="first")
    with pytest.raises(ValueError, match=r"path: expected one of \('auto', 'eager', 'fused', 'captured'\), got 'fast'"):
        model.configure(path="fast")


def test_without_onednn(monkeypatch, caplog):
    """Products of torch are used instead, and 'auto' logs this once."""
    leave_out_kernels(monkeypatch)
    for room in (onednn, layers):
        monkeypatch.setattr(room, "onednn_unsupported_reason", lambda dtype: "no such names")
    own, fused = pair()
    assert not fused.runner._encoder(fused.view()).layers[0].layer.qkv.packed
    assert_alike(own, fused, batch_for(own))
    model = ee.to_early_exit(stock(), pooling="first")
    with caplog.at_level(logging.INFO, "earlyexit_kernels"):
        model(**batch_for(model))
        model(**batch_for(model))
    said = [record for record in caplog.records if "no such names" in record.message]
    assert len(said) == 1 and said[0].levelno == logging.WARNING


def test_onednn_unsupported_reason(monkeypatch):
    leave_out_kernels(monkeypatch)
    ops = torch.ops.mkldnn
    assert onednn.onednn_unsupported_reason(torch.float16)

    class Gone:
        def __getattr__(self, name):
            raise AttributeError(f"no {name}")

    own, fused = pair()
    fused.runner.paths["fused"].layers.forget()
    onednn.onednn_unsupported_reason.cache_clear()
    monkeypatch.setattr(torch.ops, "mkldnn", Gone())
    assert "lacks the required" in onednn.onednn_unsupported_reason(torch.float32)
    assert_alike(own, fused, batch_for(own))
    monkeypatch.setattr(torch.ops, "mkldnn", ops)
    onednn.onednn_unsupported_reason.cache_clear()


def test_copies_start_unpacked_and_agree(tmp_path):
    model = ee.to_early_exit(stock(), pooling="first", criterion=Entropy(threshold=0.9))
    batch = batch_for(model)
    expected = model(**batch).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not twin.runner.paths["fused"].layers._made
        assert torch.equal(twin(**batch).logits, expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(ee.EarlyExitForSequenceClassification.from_pretrained(tmp_path)(**batch).logits, expected)


def test_threads_agree():
    model = ee.to_early_exit(stock(), pooling="first", criterion=Entropy(threshold=0.9))
    batch = batch_for(model)
    expected = model(**batch).logits
    for _ in range(5):
        model.runner.paths["fused"].layers.forget()
        with ThreadPoolExecutor(4) as pool:
            assert all(torch.equal(out.logits, expected) for out in pool.map(lambda _: model(**batch), range(8)))
