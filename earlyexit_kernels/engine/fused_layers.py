"""Fused encoder layers for inference on the CPU: the forms of layers that have them, and those of one model.

A fused layer computes the same as the family's own in fewer steps, from weights that were packed once. The original
weights stay in place; the packed ones are a second copy, which is replaced when the weights change.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from earlyexit_kernels.backbones import BackboneAdapter, GatedLayerNames, LayerNames
from earlyexit_kernels.engine import bert_weights, fused_bert, fused_gated, gated_weights
from earlyexit_kernels.engine.choice import Choice
from earlyexit_kernels.engine.encoder import Encoder, embed_alone
from earlyexit_kernels.engine.fingerprint import ModuleFingerprint
from earlyexit_kernels.engine.fused_bert import onednn_unsupported_reason, products_here
from earlyexit_kernels.engine.layer_parts import hooked
from earlyexit_kernels.engine.locks import ForkSafeLock
from earlyexit_kernels.engine.packed_layers import PackedLayer, kernels_name, kernels_unsupported_reason
from earlyexit_kernels.engine.view import embedding_weight


class Form(NamedTuple):
    """How layers of one form are recognised and packed.

    Attributes:
        unsupported_reason: ``(layer, names) ->`` why the fused layer would compute something else, or None.
        copied: ``(layer, names) ->`` the parameters that `pack` copies.
        pack: ``(layer, names, config, stored) ->`` the fused layer, called as the original one: ``layer(hidden,
            plan=...)``.
        stores: whether the packed weights can be stored in another dtype than the model's.
        rotates: whether the layers take rotary positions, from `BackboneAdapter.layer_arguments`.
    """

    unsupported_reason: Callable[[nn.Module, Any], str | None]
    copied: Callable[[nn.Module, Any], Iterable[Tensor]]
    pack: Callable[[nn.Module, Any, Any, torch.dtype], Callable[..., Tensor]]
    stores: bool
    rotates: bool


#: Keyword argument with the cosines and sines of the positions.
ROTARY = "position_embeddings"
#: Class of `BackboneAdapter.names` -> form of the layers.
FORMS: dict[type, Form] = {
    LayerNames: Form(
        bert_weights.layer_unsupported_reason,
        fused_bert.copied_parameters,
        fused_bert.pack_layer,
        stores=True,
        rotates=False,
    ),
    GatedLayerNames: Form(
        gated_weights.layer_unsupported_reason,
        fused_gated.copied_parameters,
        lambda layer, names, config, stored: fused_gated.pack_layer(layer, names, config),
        stores=False,
        rotates=True,
    ),
}


def layers_unsupported_reason(adapter: BackboneAdapter, backbone: nn.Module) -> str | None:
    """Return why a layer of a backbone cannot be computed from its weights alone, or None if all can."""
    form, layers = FORMS.get(type(adapter.names)), cast(Sequence[nn.Module], adapter.layers(backbone))
    if form is None:
        own = type(layers[0]).__name__
        return f"family {adapter.model_type!r} has no fused layers, its own ({own}) have another form"
    if reason := _arguments_unsupported_reason(adapter, backbone, form):
        return reason
    reasons = [
        form.unsupported_reason(part, adapter.names) for layer in dict.fromkeys(layers) for part in adapter.parts(layer)
    ]
    reasons += [f"a layer ({type(layer).__name__}) has a forward hook" for layer in layers if hooked(layer)]
    return next((reason for reason in reasons if reason), None)


def _arguments_unsupported_reason(adapter: BackboneAdapter, backbone: Any, form: Form) -> str | None:
    """Return why the layers of a family take other arguments than those of a form, or None."""
    title, names = f"the adapter of {adapter.model_type!r}", type(adapter.names).__name__
    if adapter.rectangle_arguments is not None:
        return f"{title} has rectangle_arguments, its layers compute attention themselves; expected names=None"
    if adapter.layer_arguments is None and form.rotates:
        return f"{title} has no layer_arguments, expected the rotary positions that layers of {names} take"
    if adapter.layer_arguments is not None and not form.rotates:
        return f"{title} has layer_arguments, which layers of {names} do not take"
    if adapter.layer_arguments is None:
        return None
    with torch.no_grad():  # what it gives the layers is known from a call only
        token = embedding_weight(backbone).new_zeros(1, 1, backbone.config.hidden_size)
        given = adapter.layer_arguments(backbone, token, torch.zeros(1, 1, dtype=torch.int64, device=token.device))
    if others := sorted({name for each in given for name in each} - {ROTARY}):
        return f"{title} gives its layers {', '.join(others)}, layers of {names} take {ROTARY} alone"
    return None


def stored_unsupported_reason(adapter: BackboneAdapter, backbone: nn.Module, stored: torch.dtype) -> str | None:
    """Return why the packed weights of a backbone cannot be stored in a dtype, or None if they can.

    Args:
        adapter, backbone: of the model, whose layers `layers_unsupported_reason` accepts.
        stored: float32 stands for the dtype of the model.
    """
    if stored == torch.float32:
        return None
    if not FORMS[type(adapter.names)].stores:
        return (
            f"the weights of {adapter.model_type!r} cannot be stored in {stored}, only those of layers of BERT's form"
        )
    reason = kernels_unsupported_reason(embedding_weight(backbone).dtype, stored)
    return f"weights stored in {stored} require the vector kernels: {reason}" if reason else None


def products_of(adapter: BackboneAdapter, dtype: torch.dtype) -> Choice:
    """Return what computes the matrix products of fused layers, as `Explanation.products`.

    Args:
        adapter: of a family whose layers have a form in `FORMS`.
        dtype: of the model.
    """
    stores = FORMS[type(adapter.names)].stores
    no_kernels = kernels_unsupported_reason(dtype) if stores else "only layers of BERT's form have them"
    if no_kernels is None:
        return Choice(kernels_name(), "vector kernels of the package")
    no_onednn, most = onednn_unsupported_reason(dtype), products_here().packed_up_to
    if no_onednn is not None:
        return Choice("torch", f"no vector kernels ({no_kernels}) and no oneDNN ({no_onednn})")
    beyond = "" if math.isinf(most) else f"; torch's own beyond {most} tokens"
    return Choice("onednn", f"no vector kernels ({no_kernels}){beyond}")


class _Packed(NamedTuple):
    made_from: ModuleFingerprint
    stored: torch.dtype
    encoder: Encoder | None
    reason: str | None

    def is_current(self, backbone: nn.Module, stored: torch.dtype) -> bool:
        return self.stored == stored and self.made_from.is_current([backbone])


class FusedLayers:
    """The fused layers of one model: packed at first use, and again after a change of the modules or weights.

    Copies and pickles of the model start without them.
    """

    def __init__(self) -> None:
        self._lock = ForkSafeLock()
        self._packed: _Packed | None = None

    def __deepcopy__(self, memo: Any) -> FusedLayers:
        return FusedLayers()

    def __reduce__(self) -> tuple[Any, ...]:
        return FusedLayers, ()

    def forget(self) -> None:
        """Drop the packed weights, also those that another thread is packing now."""
        with self._lock:
            self._packed = None

    def get_or_pack(
        self, adapter: BackboneAdapter, backbone: nn.Module, stored: torch.dtype = torch.float32
    ) -> tuple[Encoder | None, str | None]:
        """Return the encoder of a backbone on the CPU with fused layers and None, or None and the reason against them.

        Args:
            adapter, backbone: of the model.
            stored: dtype of the packed weights; float32 stands for the dtype of the model.
        """
        packed = self._packed
        if packed is None or not packed.is_current(backbone, stored):
            with self._lock:
                packed = self._packed
                if packed is None or not packed.is_current(backbone, stored):
                    packed = self._packed = _pack(adapter, backbone, stored)
        return packed.encoder, packed.reason

    def unsupported_reason(
        self, adapter: BackboneAdapter, backbone: nn.Module, stored: torch.dtype = torch.float32
    ) -> str | None:
        """Return the reason that `get_or_pack` would give, without packing."""
        packed = self._packed
        if packed is not None and packed.is_current(backbone, stored):
            return packed.reason
        return layers_unsupported_reason(adapter, backbone) or stored_unsupported_reason(adapter, backbone, stored)


def _pack(adapter: BackboneAdapter, backbone: nn.Module, stored: torch.dtype) -> _Packed:
    # fingerprints are taken first, so that a change during the check or the copy is detected at the next batch
    checked = ModuleFingerprint([backbone])
    reason = layers_unsupported_reason(adapter, backbone) or stored_unsupported_reason(adapter, backbone, stored)
    if reason:
        return _Packed(checked, stored, None, reason)
    layers: Any = tuple(adapter.layers(backbone))
    form, names, config = FORMS[type(adapter.names)], adapter.names, backbone.config
    parts = {layer: adapter.parts(layer) for layer in layers}
    copied = ModuleFingerprint(
        [backbone], [x for each in parts.values() for part in each for x in form.copied(part, names)]
    )
    try:
        packed = {layer: [form.pack(part, names, config, stored) for part in each] for layer, each in parts.items()}
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _Packed(checked, stored, None, f"there is not enough memory for a packed copy of the weights: {error}")
    alone = all(isinstance(part, PackedLayer) for each in packed.values() for part in each)
    embed = embed_alone(adapter, backbone) if alone else functools.partial(adapter.first_states, backbone)
    fused = {layer: _in_turn(each) for layer, each in packed.items()}
    made_from = copied if checked.is_current([backbone]) else checked
    return _Packed(made_from, stored, Encoder(embed, tuple(fused[layer] for layer in layers)), None)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory could not be allocated on the CPU."""
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("not enough memory", "can't allocate memory")
    )


def _in_turn(parts: Sequence[Callable[..., Tensor]]) -> Callable[..., Tensor]:
    """Return one callable that runs the encoder layers of a group one after the other."""
    if len(parts) == 1:
        return parts[0]

    def run(hidden: Tensor, **arguments: Any) -> Tensor:
        for part in parts:
            hidden = part(hidden, **arguments)
        return hidden

    return run
