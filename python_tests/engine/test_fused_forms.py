"""The form of a family's layers, and what is said of families that have no fused layers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.models import batch_for, early_exit

from earlyexit_kernels import backbones
from earlyexit_kernels.engine import resident
from earlyexit_kernels.engine.resident import resident_unsupported_reason
from earlyexit_kernels.errors import BackendUnavailableError


@pytest.mark.parametrize("family", ["llama", "eurobert", "roberta-prelayernorm", "deberta-v2", "mpnet"])
def test_family_without_fused_layers_is_named(family):
    model = early_exit(family)
    reason = f"the layers of {family!r} ({type(model.view().layers[0]).__name__}) are not supported"
    assert model.explain(**batch_for(model)).layers == ("family", reason)
    with pytest.raises(BackendUnavailableError) as error:
        model.set_layers("fused")
    assert str(error.value) == f"layers 'fused' cannot run here: {reason}; use 'auto' or 'family'"


def test_name_of_an_adapter_that_its_layers_lack():
    model = early_exit("roberta-prelayernorm")
    adapter = dataclasses.replace(model.adapter, names=backbones.LayerNames())
    reason = model.execution.layers.fused.unsupported_reason(adapter, model.backbone)
    assert reason == "RobertaPreLayerNormLayer has no module attention.output.LayerNorm, which the adapter names"


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
    "rectangles": (
        "bert",
        {"rectangle_arguments": lambda backbone, states, keep: {}},
        "has rectangle_arguments, its layers compute attention themselves; expected names=None",
    ),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_layers_that_take_other_arguments(case):
    """The layers would be computed without these arguments, in a graph without an error."""
    family, changed, words = ARGUMENTS[case]
    model = early_exit(family)
    adapter = dataclasses.replace(model.adapter, **changed)
    reason = model.execution.layers.fused.unsupported_reason(adapter, model.backbone)
    assert reason == f"the adapter of {family!r} {words}"
    assert resident_unsupported_reason(dataclasses.replace(model.view(), adapter=adapter), torch.float32) == reason


def test_kernels_of_a_graph_do_not_take_the_layers_of_another_form(monkeypatch):
    monkeypatch.delitem(resident.LAYERS, backbones.GatedLayerNames)
    reason = resident_unsupported_reason(early_exit("modernbert").view(), torch.float32)
    assert reason == "its kernels do not support layers of GatedLayerNames"


def test_autocast_and_other_devices_run_family_layers():
    model = early_exit()
    with torch.autocast("cpu", torch.bfloat16):
        assert model.layer_kind == "family"
    assert model.layer_kind == "fused"
    assert model.to("meta").layer_kind == "family"
