"""Which form the layers of a family have, and the weights of a layer by its form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from earlyexit_kernels.backbones.base import BackboneAdapter, GatedLayerNames, LayerNames
from earlyexit_kernels.backbones.forms import hooked
from earlyexit_kernels.backbones.forms_bert import read_bert_layer
from earlyexit_kernels.backbones.forms_gated import read_gated_layer
from earlyexit_kernels.errors import Unsupported

#: Keyword argument with the cosines and sines of the positions.
ROTARY = "position_embeddings"


class Form(NamedTuple):
    """How layers of one form are read.

    Attributes:
        read: ``(layer, names, config) ->`` its weights, or raises `Unsupported`.
        rotates: whether the layers take rotary positions, from `BackboneAdapter.layer_arguments`.
    """

    read: Callable[[nn.Module, Any, Any], Any]
    rotates: bool


#: Class of `BackboneAdapter.names` -> form of the layers.
FORMS: dict[type, Form] = {
    LayerNames: Form(read_bert_layer, rotates=False),
    GatedLayerNames: Form(read_gated_layer, rotates=True),
}


def check_form(adapter: BackboneAdapter, backbone: Any) -> None:
    """Check that the layers of a family have a form, and take no other arguments than layers of it.

    Raises:
        Unsupported: they do not.
    """
    form = FORMS.get(type(adapter.names))
    if form is None:
        own = type(adapter.layers(backbone)[0]).__name__
        raise Unsupported(f"family {adapter.model_type!r} has no fused layers, its own ({own}) have another form")
    if reason := _arguments_unsupported(adapter, backbone, form):
        raise Unsupported(f"the adapter of {adapter.model_type!r} {reason}")


def _arguments_unsupported(adapter: BackboneAdapter, backbone: Any, form: Form) -> str | None:
    names = type(adapter.names).__name__
    if adapter.rectangle_arguments is not None:
        return "has rectangle_arguments, its layers compute attention themselves; expected names=None"
    if adapter.layer_arguments is None and form.rotates:
        return f"has no layer_arguments, expected the rotary positions that layers of {names} take"
    if adapter.layer_arguments is not None and not form.rotates:
        return f"has layer_arguments, which layers of {names} do not take"
    if adapter.layer_arguments is None:
        return None
    with torch.no_grad():  # what it gives the layers is known from a call only
        token = backbone.get_input_embeddings().weight.new_zeros(1, 1, backbone.config.hidden_size)
        given = adapter.layer_arguments(backbone, token, torch.zeros(1, 1, dtype=torch.int64, device=token.device))
    others = sorted({name for each in given for name in each} - {ROTARY})
    return f"gives its layers {', '.join(others)}, layers of {names} take {ROTARY} alone" if others else None


def read_layer(adapter: BackboneAdapter, backbone: Any, layer: nn.Module) -> list[Any]:
    """Return the weights of the encoder layers that a layer runs in turn.

    Args:
        adapter, backbone: that `check_form` accepts.
        layer: one of its layers.

    Raises:
        Unsupported: the layer may compute something else than its weights tell.
    """
    read = FORMS[type(adapter.names)].read
    weights = [read(part, adapter.names, backbone.config) for part in adapter.parts(layer)]
    if hooked(layer):
        raise Unsupported(f"a layer ({type(layer).__name__}) has a forward hook")
    return weights
