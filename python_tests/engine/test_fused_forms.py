"""The form of a family's layers, and what is said of families that have no fused layers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.models import batch_for, early_exit

from earlyexit_kernels import backbones
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
    reason = model.execution.fused.unsupported_reason(adapter, model.backbone)
    assert reason == "RobertaPreLayerNormLayer has no module attention.output.LayerNorm, which the adapter names"


def test_kernels_of_a_graph_do_not_take_the_layers_of_another_form():
    """Not even without the norm at the end, for which ModernBERT itself is refused."""
    view = early_exit("modernbert").view()
    adapter = dataclasses.replace(view.adapter, exit_norm=lambda backbone: None)
    reason = resident_unsupported_reason(dataclasses.replace(view, adapter=adapter), torch.float32)
    assert reason == "its kernels do not support the gated layers of 'modernbert'"
