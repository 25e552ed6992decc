"""Fused encoder layers for inference on the CPU: the forms of layers that have them, and those of one model.

A fused layer computes the same as the family's own in fewer steps, from weights that oneDNN has packed once. The
original weights stay in place; the packed ones are a second copy, which is replaced when the weights change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from earlyexit_kernels.backbones import BackboneAdapter, GatedLayerNames, LayerNames
from earlyexit_kernels.engine import fused_bert, fused_gated
from earlyexit_kernels.engine.fingerprint import ModuleFingerprint
from earlyexit_kernels.engine.layer_parts import hooked
from earlyexit_kernels.engine.locks import ForkSafeLock


class Form(NamedTuple):
    """How layers of one form are recognised and packed.

    Attributes:
        unsupported_reason: ``(layer, names) ->`` why the fused layer would compute something else, or None.
        copied: ``(layer, names) ->`` the parameters that `pack` copies.
        pack: ``(layer, names, config) ->`` the fused layer, called as the original one: ``layer(hidden, plan=...)``.
    """

    unsupported_reason: Callable[[nn.Module, Any], str | None]
    copied: Callable[[nn.Module, Any], Iterable[Tensor]]
    pack: Callable[[nn.Module, Any, Any], Callable[..., Tensor]]


#: Class of `BackboneAdapter.names` -> form of the layers.
FORMS: dict[type, Form] = {
    LayerNames: Form(fused_bert.layer_unsupported_reason, fused_bert.copied_parameters, fused_bert.pack_layer),
    GatedLayerNames: Form(fused_gated.layer_unsupported_reason, fused_gated.copied_parameters, fused_gated.pack_layer),
}


def layers_unsupported_reason(adapter: BackboneAdapter, layers: Sequence[nn.Module]) -> str | None:
    """Return why a layer of a backbone cannot be computed from its weights alone, or None if all can.

    Args:
        adapter: of the backbone.
        layers: of the backbone, as the adapter lists them.
    """
    form = FORMS.get(type(adapter.names))
    if form is None:
        return f"the layers of {adapter.model_type!r} ({type(layers[0]).__name__}) are not supported"
    reasons = [
        form.unsupported_reason(part, adapter.names) for layer in dict.fromkeys(layers) for part in adapter.parts(layer)
    ]
    reasons += [f"a layer ({type(layer).__name__}) has a forward hook" for layer in layers if hooked(layer)]
    return next((reason for reason in reasons if reason), None)


class _Packed(NamedTuple):
    made_from: ModuleFingerprint
    layers: tuple[Callable[..., Tensor], ...] | None
    reason: str | None

    def is_current(self, backbone: nn.Module) -> bool:
        return self.made_from.is_current([backbone])


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
        self, adapter: BackboneAdapter, backbone: nn.Module
    ) -> tuple[Sequence[Callable[..., Any]] | None, str | None]:
        """Return the L fused layers of a backbone on the CPU and None, or None and the reason against them."""
        packed = self._packed
        if packed is None or not packed.is_current(backbone):
            with self._lock:
                packed = self._packed
                if packed is None or not packed.is_current(backbone):
                    packed = self._packed = _pack(adapter, backbone)
        return packed.layers, packed.reason

    def unsupported_reason(self, adapter: BackboneAdapter, backbone: nn.Module) -> str | None:
        """Return the reason that `get_or_pack` would give, without packing."""
        packed = self._packed
        if packed is not None and packed.is_current(backbone):
            return packed.reason
        return layers_unsupported_reason(adapter, adapter.layers(backbone))  # type: ignore[arg-type]


def _pack(adapter: BackboneAdapter, backbone: nn.Module) -> _Packed:
    # fingerprints are taken first, so that a change during the check or the copy is detected at the next batch
    checked = ModuleFingerprint([backbone])
    layers: Any = tuple(adapter.layers(backbone))
    reason = layers_unsupported_reason(adapter, layers)
    if reason:
        return _Packed(checked, None, reason)
    form, names, config = FORMS[type(adapter.names)], adapter.names, backbone.config
    parts = {layer: adapter.parts(layer) for layer in layers}
    copied = ModuleFingerprint(
        [backbone], [x for each in parts.values() for part in each for x in form.copied(part, names)]
    )
    fused = {layer: _in_turn([form.pack(part, names, config) for part in each]) for layer, each in parts.items()}
    made_from = copied if checked.is_current([backbone]) else checked
    return _Packed(made_from, tuple(fused[layer] for layer in layers), None)


def _in_turn(parts: Sequence[Callable[..., Tensor]]) -> Callable[..., Tensor]:
    """Return one callable that runs the encoder layers of a group one after the other."""
    if len(parts) == 1:
        return parts[0]

    def run(hidden: Tensor, **arguments: Any) -> Tensor:
        for part in parts:
            hidden = part(hidden, **arguments)
        return hidden

    return run
