"""Layers of ModernBERT's form in the resident loop against the eager engine, in buffers of arbitrary contents."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from engine.test_resident import HostNodes, answers, assert_as_eager, loop_for, splitting
from support.backends import backend_params
from support.models import ATTENDED, DEPTH, batch_for, early_exit, stock

import earlyexit_kernels as ee
from earlyexit_kernels.backbones import BACKBONES
from earlyexit_kernels.criteria import Entropy, FullDepth, HiddenCosine, Patience, QExit
from earlyexit_kernels.engine import resident
from earlyexit_kernels.engine.inputs import Inputs
from earlyexit_kernels.engine.resident import resident_unsupported_reason
from earlyexit_kernels.engine.resident_buffers import Bucket
from earlyexit_kernels.engine.resident_exits import exits_unsupported_reason

LENGTHS = (13, 3, 9, 12, 15, 1)


@pytest.fixture(params=backend_params(("torch", "triton")))
def backend(request) -> str:
    return request.param


@pytest.fixture
def tiles_of_a_token(monkeypatch):
    """Rows move whenever one of them leaves."""
    monkeypatch.setattr(resident, "TILE_TOKENS", 1)


@pytest.mark.sample(10)
@pytest.mark.parametrize("kind", ATTENDED)
@pytest.mark.parametrize("pooling", ["first", "mean", "head on first", "head on mean"])
def test_poolings_and_masks(pooling, kind, backend, tiles_of_a_token):
    """Windows reach over the columns of holes; angles and columns are found after rows have moved."""
    if backend == "triton" and kind != "holes":
        pytest.skip("the interpreter is slow")
    head = {"classifier_pooling": {"head on first": "cls"}.get(pooling, "mean")}
    model = early_exit("modernbert", pooling=None if pooling.startswith("head") else pooling, **head)
    batch = batch_for(model, kind, lengths=LENGTHS)
    model.set_criterion(splitting(model, batch))
    loop = loop_for(model, Bucket(8, 16), backend, poison=True)
    assert_as_eager(model, loop, batch)
    assert len(loop.exit_layer[: len(LENGTHS)].unique()) > 1, "rows leave at several layers"
    present = loop.counts[:, 3].tolist()
    assert any(0 < after < present[0] for after in present[1:]), "rows have moved"


RULES = {
    "full depth": (FullDepth(), {}),
    "patience": (Patience(patience=1), {}),
    "halting": (QExit(q=0.6), {"method": "palbert"}),
    "hidden cosine": (HiddenCosine(threshold=0.97), {}),
}


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", RULES)
def test_rules(name, backend, tiles_of_a_token):
    if backend == "triton" and name != "patience":
        pytest.skip("the interpreter is slow")
    criterion, built = RULES[name]
    model = early_exit("modernbert", criterion=criterion, pooling="first", **built)
    loop = loop_for(model, Bucket(8, 16), backend, poison=True)
    assert_as_eager(model, loop, batch_for(model, lengths=LENGTHS))


@pytest.mark.sample(2)
@pytest.mark.parametrize("kind", ["right", "holes"])
def test_positions_of_the_user(kind, backend, tiles_of_a_token):
    """They turn query and key, and leave the windows as they are."""
    if backend == "triton" and kind != "holes":
        pytest.skip("the interpreter is slow")
    model = early_exit("modernbert", pooling="first")
    batch = batch_for(model, kind, lengths=LENGTHS)
    default = model(**batch).logits
    generator = torch.Generator().manual_seed(3)
    batch["position_ids"] = torch.randint(0, 70, batch["input_ids"].shape, generator=generator)
    assert (model(**batch).logits - default).abs().max() > 1e-2
    model.set_criterion(splitting(model, batch))
    loop = loop_for(model, Bucket(8, 16), backend)
    assert_as_eager(model, loop, batch)
    del batch["position_ids"]
    assert_as_eager(model, loop, batch)


SETTINGS = {
    "biases": {"attention_bias": True, "mlp_bias": True, "norm_bias": True},
    "no windows": {"global_attn_every_n_layers": 1},
    "windows of one column": {"local_attention": 1},
    "tanh form of gelu": {"hidden_activation": "gelu_pytorch_tanh"},
    "relu, wide heads": {"hidden_activation": "relu", "num_attention_heads": 2},
    "family head with a bias": {"classifier_bias": True, "pooling": None},
    "family head on the mean": {"classifier_pooling": "mean", "pooling": None},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_the_config(name):
    sizes = {**SETTINGS[name]}
    pooling = sizes.pop("pooling", "first")
    model = ee.to_early_exit(stock("modernbert", **sizes), pooling=pooling, criterion=FullDepth())
    assert_as_eager(model, loop_for(model, Bucket(8, 16), "torch", poison=True), batch_for(model, lengths=LENGTHS))


def test_weights_are_those_of_the_layers():
    model = ee.to_early_exit(stock("modernbert", mlp_bias=True), pooling="first")
    weights = [own for (own,) in loop_for(model, Bucket(1, 16), "torch").layers.weights]
    assert [own.attention_norm is None for own in weights] == [True, False, False, False]
    assert [own.window for own in weights] == [None, 5, 5, None]
    second, layer = weights[1], model.backbone.layers[1]
    assert second.head_width == 16 and second.activation is layer.mlp.act
    assert second.inner.bias.data_ptr() == layer.mlp.Wi.bias.data_ptr() and second.qkv.bias is None
    assert not any(x.requires_grad for x in second.inner)


@pytest.mark.thorough
def test_layers_of_several_widths(backend):
    model = early_exit("modernbert", pooling="first", criterion=FullDepth())
    mlp = model.backbone.layers[1].mlp
    mlp.Wi, mlp.Wo = torch.nn.Linear(64, 2 * 40), torch.nn.Linear(40, 64)
    assert_as_eager(model, loop_for(model, Bucket(8, 16), backend, poison=True), batch_for(model, lengths=LENGTHS))


def test_layers_of_several_parts(monkeypatch):
    """All parts of a layer take its angles and its window."""
    twice = dataclasses.replace(BACKBONES["modernbert"], parts=lambda layer: (layer, layer))
    once = early_exit("modernbert", pooling="first", criterion=FullDepth())
    batch = batch_for(once, lengths=LENGTHS)
    before = once(**batch).logits
    monkeypatch.setitem(BACKBONES, "modernbert", twice)
    model = early_exit("modernbert", pooling="first", criterion=FullDepth())
    model.set_layers("fused")
    assert (model(**batch).logits - before).abs().max() > 1e-2
    assert_as_eager(model, loop_for(model, Bucket(8, 16), "torch", poison=True), batch)


def test_a_registered_family(monkeypatch):
    """What decides is the form of the layers, not the name of the family."""
    other = dataclasses.replace(BACKBONES["modernbert"], model_type="other")
    monkeypatch.setitem(BACKBONES, "modernbert", other)
    model = early_exit("modernbert", pooling="first")
    assert model.view().adapter.model_type == "other"
    assert resident_unsupported_reason(model.view(), torch.float32) is None
    batch = batch_for(model, "holes", lengths=LENGTHS)
    model.set_criterion(splitting(model, batch))
    assert_as_eager(model, loop_for(model, Bucket(8, 16), "torch", poison=True), batch)


def test_further_arguments_of_the_layers_are_an_error(monkeypatch):
    """A graph is then not captured, and the reason is the error."""
    adapter = BACKBONES["modernbert"]

    def more(backbone, hidden, positions):
        return [{**each, "softcap": 2.0} for each in adapter.layer_arguments(backbone, hidden, positions)]

    monkeypatch.setitem(BACKBONES, "modernbert", dataclasses.replace(adapter, layer_arguments=more))
    model = early_exit("modernbert", pooling="first")
    with pytest.raises(TypeError, match="softcap"):
        answers(loop_for(model, Bucket(8, 16), "torch"), batch_for(model, lengths=LENGTHS))


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_states_are_as_close_to_float64_as_those_of_the_family(dtype, backend):
    if (backend, dtype) == ("triton", torch.bfloat16):
        pytest.skip("the interpreter cannot multiply matrices of bfloat16")
    model = early_exit("modernbert", pooling="first", criterion=FullDepth()).to(dtype)
    batch = batch_for(model, lengths=LENGTHS)
    loop = loop_for(model, Bucket(8, 16), backend, poison=True)
    answers(loop, batch)
    kept = batch["attention_mask"] != 0
    exact = copy.deepcopy(model.backbone).double()
    with torch.no_grad():
        for each in (model.backbone, exact):
            each.config._attn_implementation = "sdpa"
        want, theirs = (each(**batch).last_hidden_state[kept].double() for each in (exact, model.backbone))
    ours = loop.activations.read[: len(want)].double()
    error, allowed = ((each - want).square().mean().sqrt() for each in (ours, theirs))
    assert 0 < error <= 1.25 * allowed


@pytest.mark.thorough
def test_a_row_of_nan_does_not_affect_others(backend, tiles_of_a_token):
    model = early_exit("modernbert", pooling="first", criterion=Entropy(threshold=0.7))
    batch = batch_for(model, lengths=LENGTHS)
    batch["input_ids"][2, 4] = 3
    clean = answers(loop_for(model, Bucket(8, 16), backend), batch)
    with torch.no_grad():
        model.backbone.embeddings.tok_embeddings.weight[3] = torch.nan
    loop = loop_for(model, Bucket(8, 16), backend, poison=True)
    logits, exit_layer = answers(loop, batch)
    assert logits[2].isnan().all() and exit_layer[2] == DEPTH and loop.counts[1:, 2].tolist() == [1] * DEPTH
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(logits[others], clean[0][others], atol=1e-5, rtol=1e-4)
    assert torch.equal(exit_layer[others], clean[1][others])


@pytest.mark.thorough
def test_rows_do_not_depend_on_the_batch(backend):
    # bits are equal on a GPU only: here both back-ends use the products of a library, which round by the number of rows
    model = early_exit("modernbert", pooling="first", criterion=Entropy(threshold=0.7))
    batch = batch_for(model, lengths=LENGTHS)
    logits, exit_layer = answers(loop_for(model, Bucket(8, 16), backend), batch)
    for row in (0, 1):
        alone = {name: value[row : row + 1, : LENGTHS[row]] for name, value in batch.items()}
        own = answers(loop_for(model, Bucket(1, 16), backend), alone)
        torch.testing.assert_close(own[0][0], logits[row], atol=1e-5, rtol=1e-4)
        assert own[1][0] == exit_layer[row]


def test_layers_are_behind_conditional_nodes():
    model = early_exit("modernbert", pooling="first", criterion=Entropy(threshold=0.7))
    batch = batch_for(model, lengths=LENGTHS)
    loop = loop_for(model, Bucket(8, 16), "torch")
    nodes = HostNodes(loop)
    loop.load(Inputs(**batch))
    loop.launch(nodes)
    out = model(**batch)
    assert torch.equal(loop.exit_layer[: len(LENGTHS)], out.exit_layer)
    assert nodes.added == ["when"] * 3 and nodes.ran == int(out.exit_layer.max()) - 1


class OtherLinear(torch.nn.Linear):
    """A linear that may compute something else, as that of an adapter."""


def replaced(path, module):
    return lambda backbone: backbone.set_submodule(path, module)


def fewer_heads(backbone) -> None:
    attention = backbone.layers[1].attn
    attention.Wqkv, attention.Wo = torch.nn.Linear(64, 96), torch.nn.Linear(32, 64)


CHANGES = {
    "other linear": (replaced("layers.1.mlp.Wi", OtherLinear(64, 192)), "mlp.Wi (OtherLinear) is not a plain Linear"),
    "other activation": (
        replaced("layers.2.mlp.act", torch.nn.SiLU()),
        "'NewGELUActivation', 'ReLU'], not SiLU",
    ),
    "other norm": (replaced("layers.2.mlp_norm", torch.nn.RMSNorm(64)), "mlp_norm (RMSNorm) is not a plain LayerNorm"),
    "norm without weight": (
        replaced("layers.2.attn_norm", torch.nn.LayerNorm(64, elementwise_affine=False)),
        "require a weight in each norm of a layer",
    ),
    "no norm": (replaced("layers.2.mlp_norm", torch.nn.Identity()), "a norm before the feed-forward"),
    "odd heads": (lambda backbone: setattr(backbone.layers[1].attn, "head_dim", 1), "an even width, got head_dim 1"),
    "fewer heads": (fewer_heads, "query, key and value of [192, 64] together, got [96, 64]"),
    "further module": (
        lambda backbone: backbone.layers[1].attn.add_module("adapter", torch.nn.Linear(64, 64)),
        "attn.adapter (Linear) is not supported",
    ),
    "causal": (lambda backbone: setattr(backbone.layers[1].attn, "is_causal", True), "(ModernBertAttention) is causal"),
    "other heads": (
        lambda backbone: setattr(backbone.layers[1].attn, "head_dim", 40),
        "head_dim 40, expected a divisor",
    ),
    "parameter of a layer": (
        lambda backbone: backbone.layers[1].register_parameter("scale", torch.nn.Parameter(torch.ones(1))),
        "the layer (ModernBertEncoderLayer) is not supported",
    ),
    "missing module": (lambda backbone: delattr(backbone.layers[1].attn, "Wo"), "no module attn.Wo"),
    "hook": (lambda backbone: backbone.layers[3].register_forward_hook(lambda *_: None), "has a forward hook"),
    "hook of the angles": (lambda backbone: backbone.rotary_emb.register_forward_hook(lambda *_: None), "forward hook"),
    "other norm at the end": (replaced("final_norm", torch.nn.RMSNorm(64)), "the end of the encoder (RMSNorm)"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_layers_are_refused(name):
    change, reason = CHANGES[name]
    model = early_exit("modernbert", pooling="first")
    assert resident_unsupported_reason(model.view(), torch.float32) is None
    change(model.backbone)
    assert reason in resident_unsupported_reason(model.view(), torch.float32)


@pytest.mark.parametrize("family", ["llama", "roberta-prelayernorm"])
def test_other_encoders_with_a_norm_at_the_end_are_refused(family):
    model = early_exit(family)
    own = type(model.view().layers[0]).__name__
    reason = f"family {family!r} has no fused layers, its own ({own}) have another form"
    assert resident_unsupported_reason(model.view(), torch.float32) == reason


@pytest.mark.parametrize("norm", [None, torch.nn.Identity(), torch.nn.LayerNorm(64, elementwise_affine=False)], ids=str)
def test_an_encoder_without_a_norm_with_a_weight_at_its_end_is_refused(norm):
    view = early_exit("modernbert").view()
    adapter = dataclasses.replace(view.adapter, exit_norm=lambda backbone: norm)
    reason = resident_unsupported_reason(dataclasses.replace(view, adapter=adapter), torch.float32)
    words = f"the norm at the end of the encoder ({type(norm).__name__}) is not a plain LayerNorm with a weight"
    assert reason == words


def test_a_layer_of_berts_form_before_a_norm_at_the_end_is_refused():
    view = early_exit("bert").view()
    adapter = dataclasses.replace(view.adapter, exit_norm=lambda backbone: torch.nn.LayerNorm(64))
    reason = resident_unsupported_reason(dataclasses.replace(view, adapter=adapter), torch.float32)
    assert reason == "the exits read the tokens through the norm at the end of the encoder"


def test_exits_on_each_token_and_scalars_of_means_are_refused():
    model = early_exit("modernbert", method="palbert", pooling="mean", criterion=QExit(q=0.5))
    assert "a scalar of exits on the mean" in resident_unsupported_reason(model.view(), torch.float32)
    shape = dataclasses.replace(early_exit("modernbert").heads.config, family_pooling="late")
    assert "to each token" in exits_unsupported_reason(shape, FullDepth())
