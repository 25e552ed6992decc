"""The form of a family's layers, and what is said of families that have no fused layers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.models import DECODERS, batch_for, early_exit
from transformers.models.bert.modeling_bert import BertSelfAttention

from earlyexit_kernels import backbones
from earlyexit_kernels.errors import BackendUnavailableError, Unsupported


@pytest.mark.parametrize("family", [*DECODERS, "roberta-prelayernorm", "xlm-roberta-xl", "deberta-v2", "mpnet"])
def test_family_without_fused_layers_is_named(family):
    model = early_exit(family)
    own = type(model.view().layers[0]).__name__
    reason = f"family {family!r} has no fused layers, its own ({own}) have another form"
    assert model.explain()[:2] == ("eager", reason)
    with pytest.raises(BackendUnavailableError) as error:
        model.configure(path="fused")
    assert str(error.value) == f"path 'fused' cannot run here: {reason}; use 'auto' or 'eager'"


def test_name_of_an_adapter_that_its_layers_lack():
    model = early_exit("roberta-prelayernorm")
    adapter = dataclasses.replace(model.adapter, names=backbones.LayerNames())
    reasons = model.runner.paths["fused"].layers.refusals(adapter, model.backbone, torch.float32)
    assert set(reasons) == set(range(1, 5)) and reasons[1] == (
        "RobertaPreLayerNormLayer has no module attention.output.LayerNorm, which the adapter names; an adapter of "
        "layers of another form has names=None"
    )


def with_another_argument(backbone, hidden, positions):
    own = backbones.BACKBONES["modernbert"].layer_arguments(backbone, hidden, positions)
    return [{**each, "output_attentions": False} for each in own]


#: Family and what its adapter gives its layers -> the reason against fused layers.
ARGUMENTS = {
    "no positions": (
        "modernbert",
        {"layer_arguments": None},
        "has no layer_arguments, expected the rotary positions that layers of GatedLayerNames take",
    ),
    "positions": (
        "bert",
        {"layer_arguments": backbones.BACKBONES["llama"].layer_arguments},
        "has layer_arguments, which layers of LayerNames do not take",
    ),
    "more than positions": (
        "modernbert",
        {"layer_arguments": with_another_argument},
        "gives its layers output_attentions, layers of GatedLayerNames take position_embeddings alone",
    ),
    "rectangles": (
        "bert",
        {"rectangle_arguments": lambda backbone, states, keep: {}},
        "has rectangle_arguments, its layers compute attention themselves; expected names=None",
    ),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_layers_that_take_other_arguments(case):
    """The layers would be computed without these arguments."""
    family, changed, words = ARGUMENTS[case]
    model = early_exit(family)
    adapter = dataclasses.replace(model.adapter, **changed)
    reason = f"the adapter of {family!r} {words}"
    with pytest.raises(Unsupported) as error:
        model.runner.paths["fused"].layers.refusals(adapter, model.backbone, torch.float32)
    assert str(error.value) == reason


def test_autocast_and_other_devices_run_family_layers():
    model = early_exit()
    with torch.autocast("cpu", torch.bfloat16):
        assert model.explain().path == "eager"
    assert model.explain().path == "fused"
    assert model.to("meta").explain().path == "eager"


def test_an_argument_that_only_the_layers_of_the_family_take():
    model = early_exit("modernbert")
    batch = batch_for(model)
    model.configure(path="eager")
    expected = model.trace(**batch).logits
    model.adapter = dataclasses.replace(model.adapter, layer_arguments=with_another_argument)
    model.configure(path="auto")
    assert model.explain().path == "eager"
    assert torch.equal(model.trace(**batch).logits, expected)


class OwnAttention(BertSelfAttention):
    """Attention of a family that asks for what its config says."""

    def forward(self, hidden_states, attention_mask=None, **arguments):
        asked = {"sliding_window": self.config.sliding_window, "softcap": self.config.attn_logit_softcapping}
        return super().forward(hidden_states, attention_mask, **asked, **arguments)


@pytest.mark.parametrize(("name", "value"), [("sliding_window", 2), ("attn_logit_softcapping", 0.5)])
@pytest.mark.parametrize("holder", ["config", "module"])
def test_attention_of_another_kind_is_not_fused(holder, name, value, monkeypatch):
    """Fused layers of BERT's form would attend to whole rows, without a cap of the scores; a later change is seen."""
    monkeypatch.setattr(OwnAttention, "__module__", "transformers.models.windowed.modeling_windowed")
    model = early_exit("bert")
    batch, config = batch_for(model), model.backbone.config
    full = model.trace(**batch).logits
    config.sliding_window = config.attn_logit_softcapping = None
    for layer in model.view().layers:
        layer.attention.self.__class__ = OwnAttention
    assert torch.equal(model.trace(**batch).logits, full) and model.explain().path == "fused"
    setattr(config if holder == "config" else model.backbone.encoder.layer[2].attention.self, name, value)
    reason = f"attention.self (OwnAttention) has {name} {value}, which layers of this form do not"
    choice = ("eager", reason)
    if holder == "module":
        choice = ("fused", f"they are supported and faster, except in layer 3: {reason}")
    assert model.explain()[:2] == choice
    if holder == "config":
        assert (model.trace(**batch).logits - full).abs().max() > 1e-3
