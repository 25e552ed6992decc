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


class ReLU(nn.Module):
    """Not the activation of torch that has this name."""

    def forward(self, x):
        return 2 * x.relu()


class Doubling(nn.Dropout):
    """A dropout that does something in eval mode."""

    def forward(self, x):
        return 2 * x


def put(path, module):
    return lambda layer: layer.set_submodule(path, module() if isinstance(module, type) else module)


def linear(path, inputs, outputs, *, bias=True):
    return lambda layer: layer.set_submodule(path, nn.Linear(inputs, outputs, bias=bias))


def attribute(path, **values):
    return lambda layer: vars(layer.get_submodule(path)).update(values)


def replaced(path, change):
    return lambda layer: layer.set_submodule(path, change(layer.get_submodule(path)))


def hook(path):
    return lambda layer: layer.get_submodule(path).register_forward_hook(lambda module, given, out: out + 1)


def own_forward(path):
    return lambda layer: attribute(path, forward=layer.get_submodule(path).forward)(layer)


def lora(layer) -> None:
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["Wqkv"], init_lora_weights=False), layer)


def quantized(layer) -> None:
    torch.ao.quantization.quantize_dynamic(layer.mlp, {nn.Linear}, dtype=torch.qint8, inplace=True)


def norm_of_another_package(layer) -> None:
    layer.input_layernorm.__class__ = type("EuroBertRMSNorm", (type(layer.input_layernorm),), {"__module__": "own"})


def bias_of_a_norm(layer) -> None:
    layer.input_layernorm.bias = nn.Parameter(torch.zeros(64))


BERT, GATED, GROUPED = "bert", "modernbert", "eurobert"
NOT_NORM = "is not a plain LayerNorm"
WITHOUT_WEIGHTS = "is not one of the activations of transformers without weights"
#: What happens to layer 3 -> the family, the change, and words of the reason against the fused layer.
REFUSED = {
    "a scripted linear": (
        *(BERT, replaced("output.dense", torch.jit.script)),
        "output.dense (RecursiveScriptModule) has a forward hook",
    ),
    "an adapted linear": (
        *(BERT, put("attention.self.query", Adapted(64, 64))),
        "query (Adapted) is not a plain Linear",
    ),
    "a linear without bias": (
        *(BERT, linear("output.dense", 96, 64, bias=False)),
        "output.dense (Linear) is not a plain Linear with weight and bias",
    ),
    "a module more": (BERT, put("output.adapter", nn.Linear(64, 64)), "output.adapter (Linear) is not supported"),
    "another activation": (
        *(BERT, put("intermediate.intermediate_act_fn", nn.SiLU())),
        "intermediate.intermediate_act_fn (SiLU) is not one of the activations",
    ),
    "an activation of a known name": (
        *(BERT, put("intermediate.intermediate_act_fn", ReLU())),
        "intermediate.intermediate_act_fn (ReLU) is not one of the activations",
    ),
    "another dropout": (BERT, put("output.dropout", Doubling()), "output.dropout (Doubling) is not supported"),
    "a hook": (BERT, hook("attention.output.dense"), "attention.output.dense (Linear) has a forward hook"),
    "its own forward": (BERT, own_forward("output"), "output (BertOutput) has a forward hook"),
    "gated: LoRA": (GATED, lora, "attn.Wqkv (Linear) is not a plain Linear"),
    "gated: a quantized linear": (GATED, quantized, "mlp.Wi (Linear) is not a plain Linear"),
    "gated: another norm": (GATED, put("attn_norm", nn.RMSNorm(64)), f"attn_norm (RMSNorm) {NOT_NORM}"),
    "gated: another activation": (GATED, put("mlp.act", nn.Softmax(dim=1)), f"mlp.act (Softmax) {WITHOUT_WEIGHTS}"),
    "gated: an activation with weight": (GATED, put("mlp.act", nn.PReLU()), f"mlp.act (PReLU) {WITHOUT_WEIGHTS}"),
    "gated: causal": (GATED, attribute("attn", is_causal=True), "attn (ModernBertAttention) is causal"),
    "gated: another scale": (
        *(GATED, attribute("attn", scaling=1.0)),
        "attn (ModernBertAttention) scales by 1, expected 1 / sqrt(16)",
    ),
    "grouped: another norm": (
        *(GROUPED, put("input_layernorm", nn.RMSNorm(64))),
        f"input_layernorm (RMSNorm) {NOT_NORM}",
    ),
    "grouped: a norm of another package": (
        *(GROUPED, norm_of_another_package),
        f"input_layernorm (EuroBertRMSNorm) {NOT_NORM}",
    ),
    "grouped: a bias of a norm": (GROUPED, bias_of_a_norm, f"input_layernorm (EuroBertRMSNorm) {NOT_NORM}"),
    "grouped: a norm within heads": (
        *(GROUPED, put("self_attn.q_norm", nn.LayerNorm(16))),
        "self_attn.q_norm (LayerNorm) is not supported",
    ),
    "grouped: soft-capped": (
        *(GROUPED, attribute("self_attn", attn_logit_softcapping=2.0)),
        "self_attn (EuroBertAttention) has attn_logit_softcapping 2.0, which layers of this form do not",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_layer_of_another_kind_runs_as_the_familys_own(case, caplog):
    """Seen where it was packed before and where it was not; 'auto' says it once, 'fused' raises."""
    family, change, words = REFUSED[case]
    model = early_exit(family)
    batch = batch_for(model)
    model(**batch)
    change(model.view().layers[2])
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
        path, reason = each.explain()[:2]
        assert path == "fused" and reason.startswith("they are supported and faster, except in layer 3: ")
        assert words in reason
        with pytest.raises(BackendUnavailableError, match="use 'auto' or 'eager'") as error:
            each.configure(path="fused")
        assert words in str(error.value) and each.explain().path == "fused"


def test_a_change_under_the_path_fused_raises():
    model = early_exit()
    model.configure(path="fused")
    model(**batch_for(model))
    hook("output.dense")(model.view().layers[0])
    with pytest.raises(BackendUnavailableError, match="forward hook"):
        model(**batch_for(model))


def test_parameters_of_other_modules_may_not_be_in_a_dict():
    model = early_exit()
    layer = model.view().layers[0]
    layer.output.dense = torch.utils.mkldnn.MkldnnLinear(layer.output.dense, torch.float)
    assert "output.dense (MkldnnLinear)" in model.explain().reason


#: Settings with which the family's layer raises an error -> family, change, words of the reason against the fused one.
BROKEN = {
    "window": (GATED, attribute("attn", sliding_window=0), "sliding_window 0, expected None or at least 1"),
    "heads": (GATED, attribute("attn", head_dim=15), "head_dim 15, expected a divisor of a third of 192"),
    "out": (GATED, linear("attn.Wo", 64, 32), "shape [32, 64], expected [64, 64]"),
    "inner": (GATED, linear("mlp.Wi", 64, 191), "shape [191, 64], expected [190, 64]"),
    "outer": (GATED, linear("mlp.Wo", 96, 32), "shape [32, 96], expected [64, 96]"),
    "width of shared heads": (
        *(GROUPED, attribute("self_attn", head_dim=15, scaling=15**-0.5)),
        "head_dim 15, and query, key and value of [64, 32, 32], expected whole heads",
    ),
    "heads of the value": (
        *(GROUPED, linear("self_attn.v_proj", 64, 48)),
        "query, key and value of [64, 32, 48]",
    ),
    "inputs of the key": (GROUPED, linear("self_attn.k_proj", 48, 32), "shape [32, 48], expected [32, 64]"),
    "output": (GROUPED, linear("self_attn.o_proj", 48, 64), "shape [64, 48], expected [64, 64]"),
    "second half": (GROUPED, linear("mlp.up_proj", 64, 95), "shape [95, 64], expected [96, 64]"),
    "outer of halves": (GROUPED, linear("mlp.down_proj", 95, 64), "shape [64, 95], expected [64, 96]"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_errors_are_those_of_the_family(case):
    family, change, words = BROKEN[case]
    model = early_exit(family)
    model(**batch_for(model))
    change(model.view().layers[1])
    assert words in model.explain().reason
    with pytest.raises((RuntimeError, ValueError)):
        model(**batch_for(model))


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


#: What the adapter of a family gives its layers, without which they would be computed -> the reason.
ARGUMENTS = {
    "no positions": (
        *("modernbert", {"layer_arguments": None}),
        "has no layer_arguments, expected the rotary positions that layers of GatedLayerNames take",
    ),
    "positions": (
        *("bert", {"layer_arguments": backbones.BACKBONES["llama"].layer_arguments}),
        "has layer_arguments, which layers of LayerNames do not take",
    ),
    "more than positions": (
        *("modernbert", {"layer_arguments": with_another_argument}),
        "gives its layers output_attentions, layers of GatedLayerNames take position_embeddings alone",
    ),
    "rectangles": (
        *("bert", {"rectangle_arguments": lambda backbone, states, keep: {}}),
        "has rectangle_arguments, its layers compute attention themselves; expected names=None",
    ),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_layers_that_take_other_arguments(case):
    family, changed, words = ARGUMENTS[case]
    model = early_exit(family)
    adapter = dataclasses.replace(model.adapter, **changed)
    with pytest.raises(Unsupported) as error:
        model.runner.paths["fused"].layers.refusals(adapter, model.backbone, torch.float32)
    assert str(error.value) == f"the adapter of {family!r} {words}"


def test_an_argument_that_only_the_layers_of_the_family_take():
    model = early_exit("modernbert")
    batch = batch_for(model)
    model.configure(path="eager")
    expected = model.trace(**batch).logits
    model.adapter = dataclasses.replace(model.adapter, layer_arguments=with_another_argument)
    model.configure(path="auto")
    assert model.explain().path == "eager" and torch.equal(model.trace(**batch).logits, expected)


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
    model = early_exit()
    refused = [
        (model, {"path": "fast"}, r"path: expected one of \('auto', 'eager', 'fused', 'captured'\), got 'fast'"),
        (model, {"path": "fused", "weights": "int4"}, r"weights: expected one of \('float32', .*\), got 'int4'"),
        (model, {"weights": "float16"}, "must be asked for with path 'fused', got 'auto'"),
        (
            *(early_exit("modernbert"), {"path": "fused", "weights": "float16"}),
            r"'modernbert' cannot be stored in torch\.float16",
        ),
        (
            *(early_exit().bfloat16(), {"path": "fused", "weights": "float16"}),
            r"they compute in float32, the model is torch\.bfloat16",
        ),
    ]
    for each, settings, words in refused:
        with pytest.raises((ValueError, BackendUnavailableError), match=words):
            each.configure(**settings)
    model.configure(path="fused", weights="float16")
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


def test_layers_of_the_family_have_no_products():
    model = early_exit()
    model.configure(path="eager")
    for each in (model, early_exit("deberta"), early_exit().train()):
        assert each.explain()[-3:] == (None, "", None) and "products" not in str(each.explain())


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
