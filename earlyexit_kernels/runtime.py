"""What a model keeps of how it runs: the back-end of the ops, the kind of encoder layers, when rows move together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from earlyexit_kernels import backends
from earlyexit_kernels.errors import BackendUnavailableError
from earlyexit_kernels.layers import FusedLayers, why_not_onednn
from earlyexit_kernels.packing import PACKED_ATTENTION

logger = logging.getLogger("earlyexit_kernels")

LAYERS = ("auto", "family", "fused")
ATTENTION_IS_FIXED = (
    "attn_implementation can't be chosen: an early-exit model packs the rows of a batch, and only its own attention "
    f"({PACKED_ATTENTION!r}) keeps them apart"
)


class RuntimeChoices(PreTrainedModel):
    """Base of the model, which brings `backbone` and its `adapter`."""

    backbone: Any
    adapter: Any
    compaction = "auto"
    _backend = "auto"
    _layers = "auto"
    #: What 'auto' has said of its layers, so that it says it once.
    _said = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._fused = FusedLayers()

    @property
    def backend(self) -> str:
        """The back-end of the ops on this model's device; kernels know no float64, ``"auto"`` takes torch there."""
        if self._backend == "auto" and self.dtype == torch.float64:
            return "torch"
        return backends.resolve(self._backend, self.device.type)

    def set_backend(self, backend: str) -> None:
        """Choose the back-end of the ops: ``"auto"``, ``"torch"``, ``"triton"`` or ``"cpp"``.

        Raises:
            ValueError: an unknown name.
            BackendUnavailableError: it can't run on this model's device.
        """
        backends.resolve(backend, self.device.type)
        self._backend = backend

    @property
    def layer_kind(self) -> str:
        """Which encoder layers a batch in eval mode runs now: ``"fused"``, or the family's own, ``"family"``."""
        return "family" if self._fused_layers()[0] is None else "fused"

    def set_layers(self, layers: str) -> None:
        """Choose the encoder layers of eval mode; training always runs the family's own.

        Args:
            layers: ``"family"``: its own. ``"fused"``: the same numbers, up to rounding, in fewer steps, on the CPU,
                from packed copies of the weights, which take about as much memory again. The copies are made at the
                first batch and anew when a weight has changed; one written to through ``weight.data`` in eval mode
                calls for another `set_layers`. ``"auto"``: fused where they can be had. Under autocast and
                `torch.compile` the family's own run whatever was chosen.

        Raises:
            ValueError: an unknown name.
            BackendUnavailableError: ``"fused"``, and this model can't have them.
        """
        if layers not in LAYERS:
            raise ValueError(f"layers: expected one of {LAYERS}, got {layers!r}")
        before, self._layers = self._layers, layers
        self._fused.forget()
        try:
            self._fused_layers()
        except BackendUnavailableError:
            self._layers = before
            raise

    def train(self, mode: bool = True) -> Any:
        """As in torch; the copies that fused layers have of the weights are dropped, since these will change."""
        if mode:
            self._fused.forget()
        return super().train(mode)

    def inference_layers(self) -> Sequence[Callable[..., Any]]:
        """The L encoder layers of a pass in eval mode, ``layer(hidden, None, plan=...)``.

        Raises:
            BackendUnavailableError: fused layers were asked for and can't be had any more.
        """
        fused, reason = self._fused_layers()
        if self._layers == "auto" and self._said != (said := reason or "fused"):
            self._said = said
            self._announce(reason)
        return self.adapter.layers(self.backbone) if fused is None else fused

    def _announce(self, reason: str) -> None:
        """Say once what 'auto' chose, as a warning where something is missing."""
        if reason:
            logger.info("layers 'auto' chose 'family': %s", reason)
            return
        missing = why_not_onednn(self.dtype)
        level = logging.WARNING if missing and self.dtype == torch.float32 else logging.INFO
        logger.log(level, "layers 'auto' chose 'fused'%s", f" with torch's own products: {missing}" if missing else "")

    def _fused_layers(self) -> tuple[Sequence[Callable[..., Any]] | None, str]:
        """The fused layers, or None and why not."""
        if self._layers == "family":
            return None, "they were asked for"
        if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return None, "autocast or torch.compile is at work"
        kind = self.device.type
        if kind == "cpu":
            fused, reason = self._fused.of(self.adapter, self.backbone)
        else:
            fused, reason = None, f"fused layers run on the CPU, the model is on {kind!r}"
        if reason and self._layers == "fused":
            raise BackendUnavailableError(f"layers 'fused' can't run here: {reason}; use 'auto' or 'family'")
        return fused, reason

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """Refused: packed rows need the packed attention."""
        raise ValueError(ATTENTION_IS_FIXED)
