"""Fused layers: the answers of the family's own layers, the weights they copy, and how long they keep them."""

from __future__ import annotations

import copy
import logging
import math
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.models import DEPTH, batch_for, early_exit, kinds_of, stock
from support.weight_changes import BIASES
from torch import nn

import earlyexit_kernels as ee
from earlyexit_kernels.backbones.forms_gated import RootMeanSquare
from earlyexit_kernels.core.rows import embedded
from earlyexit_kernels.core.view import Inputs
from earlyexit_kernels.cpu import layers, onednn
from earlyexit_kernels.cpu.bert import BertLayer, OneDnnLayer
from earlyexit_kernels.cpu.gated import GatedLayer
from earlyexit_kernels.cpu.kernels import PackedLayer
from earlyexit_kernels.criteria import Entropy, FullDepth, SkipGate

#: Difference between float32 results, relative to the largest value.
TOLERANCE = 5e-6
#: One row, equal rows, ragged rows, and rows longer than the window of 9 tokens.
BATCHES = ((1,), (5, 5, 5), (17, 3, 9, 12), (60, 2, 33, 34))
#: What computes the products: the vector kernels, or oneDNN with packed weights up to a number of tokens, or torch.
KERNELS = "kernels"
PRODUCTS = {
    "packed": onednn.Products(math.inf, with_activation=False),
    "with activation": onednn.Products(math.inf, with_activation=True),
    "torch": onednn.Products(0, with_activation=True),
    "by size": onednn.Products(20, with_activation=True),
}
#: A code path of each -> family and sizes. RoBERTa's layers are those of BERT.
FORMS = {
    "bert": ("bert", {}),
    "names of its own": ("distilbert", {}),
    "wider than its embeddings": ("electra", {}),
    "groups of layers": ("albert", {"inner_group_num": 2}),
    "gated, windows": ("modernbert", {}),
    "gated with biases": ("modernbert", BIASES["modernbert"]),
    "gated, shared heads": ("eurobert", {}),
    "gated, shared heads, biases": ("eurobert", BIASES["eurobert"]),
}
CASES = [("bert", products) for products in (*PRODUCTS, KERNELS)]
CASES += [(form, products) for form in list(FORMS)[1:4] for products in (KERNELS, "by size")]
CASES += [(form, products) for form in ("gated, windows", "gated, shared heads") for products in ("packed", "torch")]
CASES += [(form, "by size") for form in list(FORMS)[4:]]
every_gated = pytest.mark.parametrize("family", ["modernbert", "eurobert"])


def pair(family="bert", **sizes):
    """Return two models on the same weights, with the family's layers and with fused ones."""
    base = stock(family, **sizes)
    models = [ee.to_early_exit(base) for _ in range(2)]
    for model, path in zip(models, ("eager", "fused"), strict=True):
        model.configure(path=path)
    assert [model.explain().path for model in models] == ["eager", "fused"]
    return models


def fused_of(model) -> list:
    return list(model.runner._encoder(model.view()).layers)


def kept(model) -> dict:
    """What was packed of each layer."""
    return model.runner.paths["fused"].layers._made


def apart(got, expected) -> float:
    """Return the largest difference relative to the largest value."""
    return float((got - expected).detach().float().abs().max() / expected.detach().float().abs().max())


def assert_alike(own, fused, batch, tolerance=TOLERANCE) -> None:
    assert apart(fused.trace(**batch).logits, own.trace(**batch).logits) <= tolerance


def leave_out_kernels(monkeypatch) -> None:
    monkeypatch.setattr(layers, "kernels_unsupported_reason", lambda *dtypes: "they are left out")


def use_products(name, monkeypatch) -> None:
    """Have fused layers run on some products, or skip the test where there are none of these."""
    if name == KERNELS:
        reason = layers.kernels_unsupported_reason(torch.float32)
    else:
        leave_out_kernels(monkeypatch)
        reason = None if name == "torch" else onednn.onednn_unsupported_reason(torch.float32)
        monkeypatch.setattr(onednn, "PRODUCTS", dict.fromkeys(onednn.PRODUCTS, PRODUCTS[name]))
    if reason:
        pytest.skip(reason)


# answers


@pytest.mark.parametrize(("form", "products"), CASES)
def test_equals_the_layers_of_the_family(form, products, monkeypatch):
    """After each layer, in batches of every shape and with every kind of mask, and where rows leave."""
    use_products(products, monkeypatch)
    family, sizes = FORMS[form]
    own, fused = pair(family, **sizes)
    for lengths in BATCHES:
        for kind in kinds_of(family) if lengths == (17, 3, 9, 12) else ("right",):
            assert_alike(own, fused, batch_for(own, kind, lengths=lengths))
    batch = batch_for(own)
    for model in (own, fused):
        model.set_criterion(Entropy(threshold=0.9))
    got, expected = fused(**batch), own(**batch)
    assert torch.equal(got.exit_layer, expected.exit_layer)
    assert apart(got.logits, expected.logits) <= TOLERANCE


ACTIVATIONS = [("bert", "hidden_act", name, "kernels") for name in ("gelu_new", "gelu_pytorch_tanh", "relu")]
ACTIVATIONS += [("bert", "hidden_act", name, "packed") for name in ("gelu_new", "relu")]
ACTIVATIONS += [("bert", "hidden_act", name, "with activation") for name in ("gelu_new", "relu")]
ACTIVATIONS += [("modernbert", "hidden_activation", name, "torch") for name in ("gelu_pytorch_tanh", "silu", "linear")]
ACTIVATIONS += [("eurobert", "hidden_act", name, "torch") for name in ("gelu", "relu", "swish")]


@pytest.mark.parametrize(("family", "field", "activation", "products"), ACTIVATIONS)
def test_activations(family, field, activation, products, monkeypatch):
    use_products(products, monkeypatch)
    own, fused = pair(family, **{field: activation})
    assert_alike(own, fused, batch_for(own))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float16, 4e-3), (torch.float64, 2e-6)])
@pytest.mark.parametrize("family", ["bert", "modernbert", "eurobert"])
def test_other_dtypes(family, dtype, tolerance):
    """Traces are float32, so float64 layers agree up to float32 rounding."""
    models = pair(family)
    own, fused = (model.to(dtype) for model in models)
    layer = fused_of(fused)[0]
    qkv = getattr(layer, "layer", layer).qkv
    assert qkv.weight.dtype == dtype
    assert (qkv.packed is None) == bool(onednn.onednn_unsupported_reason(dtype))
    assert_alike(own, fused, batch_for(own), tolerance)


#: Heads of the query, of key and value, and their width.
@pytest.mark.parametrize(("heads", "shared", "width"), [(4, 4, 16), (4, 2, 16), (4, 1, 16), (8, 2, 8), (4, 2, 24)])
def test_heads_that_share_keys_and_values(heads, shared, width):
    own, fused = pair("eurobert", num_attention_heads=heads, num_key_value_heads=shared, head_dim=width)
    (layer, *_) = fused_of(fused)
    assert layer.weights.heads == heads and layer.qkv.weight.shape[0] == (heads + 2 * shared) * width
    assert_alike(own, fused, batch_for(own))


def test_a_bias_of_one_of_several_linears():
    models = pair("eurobert")
    for model in models:
        model.backbone.layers[1].self_attn.k_proj.bias = nn.Parameter(torch.linspace(-1, 1, 32))
        model.backbone.layers[2].mlp.up_proj.bias = nn.Parameter(torch.linspace(-1, 1, 96))
    assert models[1].explain().path == "fused"
    assert_alike(*models, batch_for(models[0]))


@pytest.mark.parametrize("norm", ["attention.output.LayerNorm", "output.LayerNorm"])
def test_each_norm_has_its_own_epsilon(norm):
    models = pair()
    for model in models:
        model.backbone.encoder.layer[1].get_submodule(norm).eps = 0.5
    assert_alike(*models, batch_for(models[0]))


def test_embeddings_that_are_not_contiguous():
    models = pair()
    for model in models:
        words = model.backbone.embeddings.word_embeddings
        words.weight = nn.Parameter(words.weight.detach().T.contiguous().T)
        assert not words.weight.is_contiguous()
    assert_alike(*models, batch_for(models[0]))


class Gone:
    """Stands for `torch.ops.mkldnn` of a torch that has other private names."""

    def __getattr__(self, name):
        raise AttributeError(f"no {name}")


@pytest.mark.parametrize("family", ["bert", "modernbert", "eurobert"])
def test_without_the_private_names_of_onednn(family, monkeypatch, caplog):
    """Products of torch are used, which 'auto' says once, as a warning."""
    leave_out_kernels(monkeypatch)
    own, fused = pair(family)
    onednn.onednn_unsupported_reason.cache_clear()
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO, "earlyexit_kernels"):
        patch.setattr(torch.ops, "mkldnn", Gone())
        assert "lacks the required" in onednn.onednn_unsupported_reason(torch.float32)
        assert_alike(own, fused, batch_for(own))
        model = ee.to_early_exit(stock(family))
        for _ in range(2):
            model(**batch_for(model))
    onednn.onednn_unsupported_reason.cache_clear()
    said = [record for record in caplog.records if "lacks the required" in record.message]
    assert [record.levelno for record in said] == [logging.WARNING] and "products by 'torch'" in said[0].message


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_without_the_extension(activation, monkeypatch):
    monkeypatch.setattr(layers, "available_backends", lambda device: {"cpp": "left out"})
    use_products("packed", monkeypatch)
    own, fused = pair(hidden_act=activation)
    assert type(fused_of(fused)[0]) is BertLayer
    assert_alike(own, fused, batch_for(own))


@pytest.mark.parametrize("family", ["bert", "modernbert", "eurobert"])
@torch.no_grad()
def test_rows_that_are_not_numbers_do_not_affect_others(family):
    _, fused = pair(family)
    view, batch, after = fused.view(), batch_for(fused), []
    encoder = fused.runner._encoder(view)
    rows, _ = embedded(view, Inputs(**batch), encoder.embed, with_keys=False)
    start, end = rows.offsets[1:3].tolist()
    for value in (0.5, torch.nan):
        some = rows.with_hidden(rows.hidden.clone())
        some.hidden[start:end] = value
        for number, layer in enumerate(encoder.layers, start=1):
            some.through(number, layer)
        after.append(some.hidden)
    rest = torch.tensor([*range(start), *range(end, len(after[0]))])
    assert after[1][start:end].isnan().all() and torch.isfinite(after[0]).all()
    assert torch.equal(after[1][rest], after[0][rest])


@every_gated
def test_gates_run_a_layer_on_some_rows(family):
    """Rows that a gate lets run are gathered, with the positions that they have in the request."""
    model = ee.to_early_exit(stock(family), method="smartbert")
    batch = batch_for(model)
    for gate in model.heads.gates:
        nn.init.normal_(gate.out.weight, std=3.0)
    model.set_criterion(SkipGate(threshold=0.5, exit=FullDepth()))
    got = model(**batch)
    assert model.explain().path == "fused" and len(got.layers_run.unique()) > 1
    model.configure(path="eager")
    expected = model(**batch)
    assert torch.equal(got.layers_run, expected.layers_run)
    assert apart(got.logits, expected.logits) <= TOLERANCE


# weights


@pytest.mark.parametrize("form", ["bert", "groups of layers", "gated with biases", "gated, shared heads, biases"])
def test_a_write_to_any_parameter_of_a_layer_is_seen(form):
    """Below the version counters of tensors; the two models share their parameters."""
    family, sizes = FORMS[form]
    own, fused = pair(family, **sizes)
    batch, scale = batch_for(own), 1.5
    before = fused.trace(**batch).logits
    for name, parameter in fused.view().layers[1].named_parameters():
        parameter.data.mul_(-scale).add_(0.1)
        expected = own.trace(**batch).logits
        assert apart(fused.trace(**batch).logits, expected) <= 2 * TOLERANCE, name
        # softmax does not see a constant added to all keys
        assert apart(expected, before) > 1e-4 or (".k" in name and "bias" in name), f"{name}: would not be detected"
        before = expected


def test_only_products_and_linears_side_by_side_are_copied():
    _, fused = pair("modernbert", **BIASES["modernbert"])
    for own, layer in zip(fused.backbone.layers, fused_of(fused), strict=True):
        linears = {layer.qkv: own.attn.Wqkv, layer.attention_out: own.attn.Wo}
        linears |= {layer.inner: own.mlp.Wi, layer.outer: own.mlp.Wo}
        for got, linear in linears.items():
            assert got.weight.data_ptr() == linear.weight.data_ptr() and got.bias.data_ptr() == linear.bias.data_ptr()
            assert not got.weight.requires_grad and not got.bias.requires_grad
        assert layer.weights.norm.weight.data_ptr() == own.mlp_norm.weight.data_ptr()
    _, fused = pair("eurobert")
    own, layer = fused.backbone.layers[1], fused_of(fused)[1]
    assert layer.outer.weight.data_ptr() == own.mlp.down_proj.weight.data_ptr()
    assert isinstance(layer.weights.norm, RootMeanSquare)
    assert layer.weights.norm.weight.data_ptr() == own.post_attention_layernorm.weight.data_ptr()


def test_a_layer_is_packed_once_when_a_batch_reaches_it(monkeypatch):
    packed, make = [], layers._make
    monkeypatch.setattr(layers, "_make", lambda source, layer: packed.append(layer) or make(source, layer))
    model = ee.to_early_exit(stock("bert"), criterion=Entropy(threshold=2.0))
    own, batch = model.backbone.encoder.layer, batch_for(model)
    model(**batch)
    assert packed == [own[0]], "all rows leave behind it"
    model.set_criterion(None)
    for _ in range(3):
        model(**batch)
    assert packed == list(own)
    with torch.no_grad():
        own[2].output.dense.weight.mul_(1.5)
    model(**batch)
    assert packed[DEPTH:] == [own[2]]
    own[1] = copy.deepcopy(own[1])
    model(**batch)
    assert set(kept(model)) == set(own), "copies of layers that are gone are dropped"
    model = ee.to_early_exit(stock("albert"))
    assert len({id(layer) for layer in fused_of(model)}) == 2, "each group is packed once"


@pytest.mark.parametrize("family", ["bert", "eurobert"])
def test_copies_of_a_model_start_unpacked_and_agree(family, tmp_path):
    model = ee.to_early_exit(stock(family), criterion=Entropy(threshold=0.9))
    batch = batch_for(model)
    expected = model(**batch).logits
    assert len(kept(model)) == DEPTH
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not kept(twin)
        assert torch.equal(twin(**batch).logits, expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(ee.EarlyExitForSequenceClassification.from_pretrained(tmp_path)(**batch).logits, expected)


def test_train_mode_drops_the_copies_and_runs_family_layers():
    model = early_exit()
    batch = batch_for(model)
    model(**batch)
    assert kept(model)
    model.train()
    assert not kept(model)
    model(**batch, labels=torch.zeros(4, dtype=torch.long)).loss.backward()
    assert model.backbone.encoder.layer[0].output.dense.weight.grad is not None
    assert not kept(model)


def test_threads_that_pack_at_the_same_time_agree():
    model = early_exit(criterion=Entropy(threshold=0.9))
    batch = batch_for(model)
    expected = model(**batch).logits
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            model.runner.paths["fused"].layers.forget()
            assert all(torch.equal(out.logits, expected) for out in pool.map(lambda _: model(**batch), range(8)))


OUT_OF_MEMORY = [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]


@pytest.mark.parametrize("error", [*OUT_OF_MEMORY, RuntimeError("a fault of the package")], ids=repr)
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_too_little_memory_for_the_copies_runs_the_family_layers(family, error, monkeypatch):
    """Other errors while packing are raised."""

    def pack(*args):
        raise error

    model = early_exit(family)
    own = model.trace(**batch_for(model)).logits
    model.refresh()
    for kind in (PackedLayer, OneDnnLayer, GatedLayer):
        monkeypatch.setattr(kind, "of", staticmethod(pack))
    if error not in OUT_OF_MEMORY:
        with pytest.raises(RuntimeError, match="a fault of the package"):
            model(**batch_for(model))
        return
    assert apart(model.trace(**batch_for(model)).logits, own) <= TOLERANCE
    assert "not enough memory for a packed copy" in model.explain().reason
    model.configure(path="fused")
    with pytest.raises(ee.BackendUnavailableError, match="not enough memory for a packed copy"):
        model(**batch_for(model))


def test_a_weight_replaced_while_its_layer_is_packed_is_noticed(monkeypatch):
    model, read = early_exit("bert"), layers.Source.read
    model.configure(path="fused")

    def replaced_meanwhile(source, layer):
        weights = read(source, layer)
        query = layer.attention.self.query
        query.weight = nn.Parameter(2 * query.weight.detach())
        return weights

    with monkeypatch.context() as patched:
        patched.setattr(layers.Source, "read", replaced_meanwhile)
        model.trace(**batch_for(model))
    got = model.trace(**batch_for(model)).logits
    model.configure(path="eager")
    torch.testing.assert_close(got, model.trace(**batch_for(model)).logits, atol=2e-5, rtol=1e-4)
