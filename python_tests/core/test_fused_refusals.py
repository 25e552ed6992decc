"""Read or raise: layers that may compute something else than their weights tell run as the family's own.

Also what `explain` says of the path, the products and the stored weights.
"""

from __future__ import annotations

import copy
import dataclasses
import logging

import pytest
import torch
import torch.utils.mkldnn
from core.test_fused import apart
from support.models import batch_for, early_exit
from torch import nn
from transformers.models.bert.modeling_bert import BertSelfAttention

from earlyexit_kernels import backbones
from earlyexit_kernels.cpu import kernels, layers
from earlyexit_kernels.cpu.kernels import STORED, kernels_unsupported_reason
from earlyexit_kernels.cpu.onednn import onednn_unsupported_reason
from earlyexit_kernels.cpu.panels import native_layouts
from earlyexit_kernels.errors import BackendUnavailableError, Unsupported

TOLERANCE = 5e-6
needs_kernels = pytest.mark.skipif(
    bool(kernels_unsupported_reason(torch.float32)), reason="the processor has no vector kernels"
)

# layers


class Adapted(nn.Linear):
    """A linear with an adapter, as adapter libraries insert it."""


class Tagged(torch.Tensor):
    """A weight of a library that keeps more than numbers."""

    def __deepcopy__(self, memo):
        return nn.Parameter(self.detach().clone().as_subclass(Tagged))


class ReLU(nn.Module):
    """Not the activation of torch that has this name."""

    def forward(self, x):
        return 2 * x.relu()


class Doubling(nn.Dropout):
    """A dropout that does something in eval mode."""

    def forward(self, x):
        return 2 * x


def another(module):
    return lambda old: module


def setting(**values):
    return lambda module: vars(module).update(values)


def hook(module) -> None:
    module.register_forward_hook(lambda module, inputs, output: output + 1)


def own_forward(module) -> None:
    module.forward = module.forward


def lora(linear):
    peft, holder = pytest.importorskip("peft"), nn.ModuleDict({"linear": linear})
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["linear"], init_lora_weights=False), holder)
    return holder["linear"]


def quantized(linear):
    return torch.ao.quantization.quantize_dynamic(nn.ModuleList([linear]), {nn.Linear}, dtype=torch.qint8)[0]


def tagged(linear) -> None:
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Tagged))


def of_another_package(norm) -> None:
    norm.__class__ = type("EuroBertRMSNorm", (type(norm),), {"__module__": "own"})


def bias_of_a_norm(norm) -> None:
    norm.bias = nn.Parameter(torch.zeros(64))


BERT, GATED, GROUPED = "bert", "modernbert", "eurobert"
HOOK, NOT_NORM, UNKNOWN = "has a forward hook", "is not a plain LayerNorm", "is not supported"
WITHOUT_WEIGHTS = "is not one of the activations of transformers without weights"
ACTIVATIONS = "is not one of the activations ['GELUActivation', 'GELUTanh', 'NewGELUActivation', 'ReLU']"
ACT, SOFTCAP = "intermediate.intermediate_act_fn", "attn_logit_softcapping"
#: What happens to layer 3: the family, a module, its change, and the reason against the fused layer.
REFUSED = [
    (BERT, "output.dense", torch.jit.script, HOOK),
    (BERT, "attention.self.query", another(Adapted(64, 64)), "is not a plain Linear with weight and bias"),
    (BERT, "output.dense", another(nn.Linear(96, 64, bias=False)), "is not a plain Linear with weight and bias"),
    (BERT, "output.dense", tagged, "is not a plain Linear with weight and bias"),
    (BERT, "output.adapter", another(nn.Linear(64, 64)), UNKNOWN),
    (BERT, ACT, another(nn.SiLU()), ACTIVATIONS),
    (BERT, ACT, another(ReLU()), ACTIVATIONS),
    (BERT, "output.dropout", another(Doubling()), UNKNOWN),
    (BERT, "attention.output.dense", hook, HOOK),
    (BERT, "output", own_forward, HOOK),
    (GATED, "attn.Wqkv", lora, "is not a plain Linear"),
    (GATED, "mlp.Wo", tagged, "is not a plain Linear"),
    (GATED, "mlp.Wi", quantized, "is not a plain Linear"),
    (GATED, "attn_norm", another(nn.RMSNorm(64)), NOT_NORM),
    (GATED, "mlp.act", another(nn.Softmax(dim=1)), WITHOUT_WEIGHTS),
    (GATED, "mlp.act", another(nn.PReLU()), WITHOUT_WEIGHTS),
    (GATED, "attn", setting(is_causal=True), "is causal"),
    (GATED, "attn", setting(scaling=1.0), "scales by 1, expected 1 / sqrt(16)"),
    (GROUPED, "input_layernorm", another(nn.RMSNorm(64)), NOT_NORM),
    (GROUPED, "input_layernorm", of_another_package, NOT_NORM),
    (GROUPED, "input_layernorm", bias_of_a_norm, NOT_NORM),
    (GROUPED, "self_attn.q_norm", another(nn.LayerNorm(16)), UNKNOWN),
    (GROUPED, "self_attn", setting(**{SOFTCAP: 2.0}), f"has {SOFTCAP} 2.0, which layers of this form do not"),
]


def change(layer, path, how):
    """Change a module of a layer, or put another one in its place; return the one that lies there then."""
    new = how(dict(layer.named_modules()).get(path))
    if new is not None:
        layer.set_submodule(path, new)
    return layer.get_submodule(path)


@pytest.mark.parametrize(("family", "path", "how", "reason"), REFUSED)
def test_a_layer_of_another_kind_runs_as_the_familys_own(family, path, how, reason, caplog):
    """Seen where it was packed before and where it was not; 'auto' says it once, 'fused' raises."""
    model = early_exit(family)
    batch = batch_for(model)
    model(**batch)
    module = change(model.view().layers[2], path, how)
    words = f"{path} ({type(module).__name__}) {reason}"
    own, unpacked = copy.deepcopy(model), copy.deepcopy(model)
    own.configure(path="eager")
    expected = own.trace(**batch).logits
    with caplog.at_level(logging.INFO, "earlyexit_kernels"):
        for _ in range(2):
            assert apart(model.trace(**batch).logits, expected) <= TOLERANCE
    assert sum(words in record.message for record in caplog.records) == 1, caplog.records
    runs = model.runner._encoder(model.view()).layers
    assert [run is layer for run, layer in zip(runs, model.view().layers, strict=True)] == [False, False, True, False]
    for each in (model, unpacked):
        assert apart(each.trace(**batch).logits, expected) <= TOLERANCE
        assert each.explain()[:2] == ("fused", f"they are supported and faster, except in layer 3: {words}")
        with pytest.raises(BackendUnavailableError, match="use 'auto' or 'eager'") as error:
            each.configure(path="fused")
        assert words in str(error.value) and each.explain().path == "fused"


def test_a_change_under_the_path_fused_raises():
    model = early_exit()
    model.configure(path="fused")
    model(**batch_for(model))
    change(model.view().layers[0], "output.dense", hook)
    with pytest.raises(BackendUnavailableError, match="forward hook"):
        model(**batch_for(model))


def test_parameters_of_other_modules_may_not_be_in_a_dict():
    model = early_exit()
    layer = model.view().layers[0]
    layer.output.dense = torch.utils.mkldnn.MkldnnLinear(layer.output.dense, torch.float)
    assert "output.dense (MkldnnLinear)" in model.explain().reason


#: Settings with which the family's layer raises an error: family, module, change, words of the reason.
BROKEN = [
    (BERT, "intermediate.dense", another(nn.Linear(64, 95)), "[64, 96] and [64], expected [64, 95] and [64]"),
    (BERT, "output.dense", another(nn.Linear(96, 32)), "[32, 96] and [32], expected [64, 96] and [64]"),
    (BERT, "output.LayerNorm", another(nn.LayerNorm(1)), "[1] and [1], expected [64] and [64]"),
    (BERT, "attention.output.dense", another(nn.Linear(96, 64)), "[64, 96] and [64], expected [64, 64] and [64]"),
    (BERT, "attention.self.query", another(nn.Linear(32, 64)), "[64, 64] and [64], expected [64, 32] and [64]"),
    (BERT, "attention.self.key", another(nn.Linear(64, 96)), "[96, 64] and [96], expected [64, 64] and [64]"),
    (BERT, "attention.self.value", another(nn.Linear(64, 32)), "[32, 64] and [32], expected [64, 64] and [64]"),
    (GATED, "attn", setting(sliding_window=0), "sliding_window 0, expected None or at least 1"),
    (GATED, "attn", setting(head_dim=15), "head_dim 15, expected a divisor of a third of 192"),
    (GATED, "attn.Wo", another(nn.Linear(64, 32)), "shape [32, 64], expected [64, 64]"),
    (GATED, "mlp.Wi", another(nn.Linear(64, 191)), "shape [191, 64], expected [190, 64]"),
    (GATED, "mlp.Wo", another(nn.Linear(96, 32)), "shape [32, 96], expected [64, 96]"),
    (GROUPED, "self_attn", setting(head_dim=15, scaling=15**-0.5), "[64, 32, 32], expected whole heads"),
    (GROUPED, "self_attn.v_proj", another(nn.Linear(64, 48)), "query, key and value of [64, 32, 48]"),
    (GROUPED, "self_attn.k_proj", another(nn.Linear(48, 32)), "shape [32, 48], expected [32, 64]"),
    (GROUPED, "self_attn.o_proj", another(nn.Linear(48, 64)), "shape [64, 48], expected [64, 64]"),
    (GROUPED, "mlp.up_proj", another(nn.Linear(64, 95)), "shape [95, 64], expected [96, 64]"),
    (GROUPED, "mlp.down_proj", another(nn.Linear(95, 64)), "shape [64, 95], expected [64, 96]"),
]


@pytest.mark.parametrize(("family", "path", "how", "words"), BROKEN)
def test_errors_are_those_of_the_family(family, path, how, words):
    model = early_exit(family)
    model(**batch_for(model))
    change(model.view().layers[1], path, how)
    assert words in model.explain().reason
    with pytest.raises((RuntimeError, ValueError)):
        model(**batch_for(model))


@pytest.mark.parametrize("outputs", [(96, 64), (64, 96), (32, 32), (32, 96), (96, 32)])
@pytest.mark.parametrize("path", ["auto", "eager"])
@pytest.mark.parametrize("family", [BERT, "deberta-v2"])
def test_heads_of_keys_and_values_are_those_of_the_stock_model(family, path, outputs):
    """Queries have 64 outputs; 32 of keys and values would be heads that queries share, in other families."""
    model, stock = early_exit(family), early_exit(family).backbone
    names = ("key", "value") if family == BERT else ("key_proj", "value_proj")
    for layer in (model.view().layers[1], stock.encoder.layer[1]):
        for name, size in zip(names, outputs, strict=True):
            change(layer, f"attention.self.{name}", another(nn.Linear(64, size)))
    model.configure(path=path)
    batch = batch_for(model)
    for run in (stock, model):
        with pytest.raises((RuntimeError, ValueError)):
            run(**batch)


class OwnAttention(BertSelfAttention):
    """Attention of a family that asks for what its config says."""

    def forward(self, hidden_states, attention_mask=None, **arguments):
        asked = {"sliding_window": self.config.sliding_window, "softcap": self.config.attn_logit_softcapping}
        return super().forward(hidden_states, attention_mask, **asked, **arguments)


@pytest.mark.parametrize(("name", "value"), [("sliding_window", 2), ("attn_logit_softcapping", 0.5)])
@pytest.mark.parametrize("holder", ["config", "module"])
def test_attention_of_another_kind_is_seen_when_it_is_set_later(holder, name, value, monkeypatch):
    """Fused layers of BERT's form would attend to whole rows, without a cap of the scores."""
    monkeypatch.setattr(OwnAttention, "__module__", "transformers.models.windowed.modeling_windowed")
    model = early_exit("bert")
    batch, config = batch_for(model), model.backbone.config
    full = model.trace(**batch).logits
    config.sliding_window = config.attn_logit_softcapping = None
    for layer in model.view().layers:
        layer.attention.self.__class__ = OwnAttention
    assert torch.equal(model.trace(**batch).logits, full) and model.explain().path == "fused"
    setattr(config if holder == "config" else model.view().layers[2].attention.self, name, value)
    reason = f"attention.self (OwnAttention) has {name} {value}, which layers of this form do not"
    expected = {"config": ("eager", reason)}
    expected["module"] = ("fused", f"they are supported and faster, except in layer 3: {reason}")
    assert model.explain()[:2] == expected[holder]
    if holder == "config":
        assert (model.trace(**batch).logits - full).abs().max() > 1e-3


# families and their adapters


@pytest.mark.parametrize("family", ["llama", "roberta-prelayernorm", "xlm-roberta-xl", "deberta-v2"])
def test_family_without_fused_layers_is_named(family):
    model = early_exit(family)
    own = type(model.view().layers[0]).__name__
    reason = f"family {family!r} has no fused layers, its own ({own}) have another form"
    assert model.explain()[:2] == ("eager", reason)
    with pytest.raises(BackendUnavailableError) as error:
        model.configure(path="fused")
    assert str(error.value) == f"path 'fused' cannot run here: {reason}; use 'auto' or 'eager'"


def with_another_argument(backbone, hidden, positions):
    own = backbones.BACKBONES["modernbert"].layer_arguments(backbone, hidden, positions)
    return [{**arguments, "output_attentions": False} for arguments in own]


#: Family, what its adapter gives its layers, without which they would be computed, and the reason against it.
ARGUMENTS = [
    (
        "modernbert",
        "layer_arguments",
        None,
        "has no layer_arguments, expected the rotary positions that layers of Gated",
    ),
    ("bert", "layer_arguments", backbones.BACKBONES["llama"].layer_arguments, "has layer_arguments, which layers of"),
    ("modernbert", "layer_arguments", with_another_argument, "gives its layers output_attentions, layers of Gated"),
    ("bert", "rectangle_arguments", dict, "has rectangle_arguments, its layers compute attention themselves"),
]


@pytest.mark.parametrize(("family", "field", "value", "words"), ARGUMENTS)
def test_layers_that_take_other_arguments(family, field, value, words):
    model = early_exit(family)
    adapter = dataclasses.replace(model.adapter, **{field: value})
    with pytest.raises(Unsupported, match=f"^the adapter of {family!r} {words}"):
        model.runner.paths["fused"].layers.refusals(adapter, model.backbone, torch.float32)


def test_name_of_an_adapter_that_its_layers_lack():
    model = early_exit("roberta-prelayernorm")
    adapter = dataclasses.replace(model.adapter, names=backbones.LayerNames())
    reasons = model.runner.paths["fused"].layers.refusals(adapter, model.backbone, torch.float32)
    assert set(reasons) == {1, 2, 3, 4} and reasons[1] == (
        "RobertaPreLayerNormLayer has no module attention.output.LayerNorm, which the adapter names; an adapter of "
        "layers of another form has names=None"
    )


# settings, and what is said of them


def test_autocast_and_other_devices_run_family_layers():
    model = early_exit()
    with torch.autocast("cpu", torch.bfloat16):
        assert model.explain().path == "eager"
    assert model.explain().path == "fused"
    assert model.to("meta").explain().path == "eager"


NO_KERNELS, NO_ONEDNN = "the processor is too old", "no such names"


def leave_out(monkeypatch, *, onednn=False) -> None:
    monkeypatch.setattr(layers, "kernels_unsupported_reason", lambda *dtypes: NO_KERNELS)
    monkeypatch.setattr(layers, "onednn_unsupported_reason", lambda dtype: NO_ONEDNN if onednn else None)


@needs_kernels
def test_refused_settings(monkeypatch):
    model, narrow = early_exit(), {"path": "fused", "weights": "float16"}
    refused = [
        (model, {"path": "fast"}, r"path: expected one of \('auto', 'eager', 'fused', 'captured'\), got 'fast'"),
        (model, {"path": "fused", "weights": "int4"}, r"weights: expected one of \('float32', .*\), got 'int4'"),
        (model, {"weights": "float16"}, "must be asked for with path 'fused', got 'auto'"),
        (early_exit("modernbert"), narrow, r"'modernbert' cannot be stored in torch\.float16"),
        (early_exit().bfloat16(), narrow, r"they compute in float32, the model is torch\.bfloat16"),
    ]
    for each, settings, words in refused:
        with pytest.raises((ValueError, BackendUnavailableError), match=words):
            each.configure(**settings)
    model.configure(**narrow)
    leave_out(monkeypatch)
    model.refresh()
    with pytest.raises(BackendUnavailableError, match=f"require the vector kernels: {NO_KERNELS}"):
        model(**batch_for(model))


@needs_kernels
def test_int8_without_its_instructions_is_refused(monkeypatch):
    layouts = {dtype: layout for dtype, layout in native_layouts().items() if dtype != torch.int8}
    monkeypatch.setattr(kernels, "native_layouts", lambda: layouts)
    assert kernels_unsupported_reason(torch.float32) is None
    with pytest.raises(BackendUnavailableError, match=r"weights in torch\.int8 require AVX512-VNNI, .*CAPABILITY=avx2"):
        early_exit().configure(path="fused", weights="int8")


def test_refused_configuration_keeps_the_copies():
    model = early_exit()
    model(**batch_for(model))
    made, settings = model.runner.paths["fused"].layers, model.settings
    for refused in ({"path": "captured"}, {"path": "fused", "backend": "nonsense"}):
        with pytest.raises((BackendUnavailableError, ValueError)):
            model.configure(**refused)
    assert model.runner.paths["fused"].layers is made and model.settings == settings


@needs_kernels
@pytest.mark.parametrize("stored", STORED)
def test_explain_names_the_kernels_and_the_type_of_the_weights(stored, monkeypatch):
    if reason := kernels_unsupported_reason(torch.float32, STORED[stored]):
        pytest.skip(reason)
    described = kernels.extension_function("layer_kernels")()
    monkeypatch.setattr(kernels, "extension_function", lambda name: lambda: {**described, "name": "AVX-512"})
    model = early_exit()
    model.configure(path="fused", weights=stored)
    said = model.explain()
    assert (said.products, said.weights) == ("avx512", stored) and len(str(said).splitlines()) <= 6
    assert f"products of the layers 'avx512': vector kernels of the package\nweights stored in {stored!r}" in str(said)


#: Family and dtype -> products, and the reason why these.
PRODUCTS = [
    ("bert", torch.float32, "onednn", NO_KERNELS),
    ("bert", torch.bfloat16, "onednn", NO_KERNELS),
    ("modernbert", torch.float32, "onednn", "only layers of BERT's form"),
    ("bert", torch.float16, "torch", str(onednn_unsupported_reason(torch.float16))),
    ("modernbert", torch.float16, "torch", "it is not used for torch.float16"),
]


@pytest.mark.parametrize(("family", "dtype", "products", "why"), PRODUCTS)
def test_explain_names_other_products(family, dtype, products, why, monkeypatch):
    monkeypatch.setattr(layers, "kernels_unsupported_reason", lambda *dtypes: NO_KERNELS)
    said = early_exit(family).to(dtype).explain()
    assert (said.products, said.weights) == (products, str(dtype).removeprefix("torch.")) and why in said.why
    for capability, beyond in (("AVX2", products == "onednn"), ("AVX512", False)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert ("torch's own beyond 128 tokens" in early_exit(family).to(dtype).explain().why) == beyond


@pytest.mark.parametrize(("onednn", "level"), [(False, logging.INFO), (True, logging.WARNING)])
@pytest.mark.parametrize(("family", "words"), [("bert", NO_KERNELS), ("modernbert", "only layers of BERT's form")])
def test_auto_logs_the_products(family, words, onednn, level, monkeypatch, caplog):
    """A missing part of torch is a warning."""
    leave_out(monkeypatch, onednn=onednn)
    model = early_exit(family)
    with caplog.at_level(logging.INFO, "earlyexit_kernels"):
        model(**batch_for(model))
    said = [record for record in caplog.records if "chose 'fused'" in record.message]
    assert [record.levelno for record in said] == [level] and words in said[0].message
    assert ("products by 'torch'" if onednn else "products by 'onednn'") in said[0].message
