"""Which encoder layers a model runs in eval mode: the family's own, or the fused ones."""

from __future__ import annotations

import logging

import torch

from earlyexit_kernels.engine.choice import REQUESTED, Choice
from earlyexit_kernels.engine.encoder import Encoder, family_encoder
from earlyexit_kernels.engine.fused_layers import FusedLayers, products_of
from earlyexit_kernels.engine.packed_layers import STORED
from earlyexit_kernels.engine.view import ModelView
from earlyexit_kernels.errors import BackendUnavailableError

logger = logging.getLogger("earlyexit_kernels")

LAYER_KINDS = ("auto", "family", "fused")


class LayerChoice:
    """The kind of encoder layers of one model, and its packed weights.

    Copies and pickles keep the choice and start without packed weights.

    Attributes:
        fused: the packed weights.
    """

    def __init__(self) -> None:
        self.fused = FusedLayers()
        self._layers, self._weights = "auto", "float32"
        self._logged: set[str] = set()

    def set(self, view: ModelView, layers: str, weights: str) -> None:
        """Choose the kind of layers; see the model's method `set_layers`."""
        for name, value, options in (("layers", layers, LAYER_KINDS), ("weights", weights, tuple(STORED))):
            if value not in options:
                raise ValueError(f"{name}: expected one of {options}, got {value!r}")
        if weights != "float32" and layers != "fused":
            raise ValueError(
                f"weights={weights!r} changes results, so it must be asked for with layers 'fused', got {layers!r}"
            )
        before = self._layers, self._weights
        self._layers, self._weights = layers, weights
        self.fused.forget()
        try:
            self.kind(view)
        except BackendUnavailableError:
            self._layers, self._weights = before
            raise

    def kind(self, view: ModelView) -> Choice:
        """Return the kind of encoder layers of the next batch, ``"fused"`` or ``"family"``, and why. Packs nothing."""
        _, reason = self._find(view, pack=False)
        if reason:
            return Choice("family", reason)
        return Choice("fused", REQUESTED if self._layers == "fused" else "they are supported and faster")

    def products(self, view: ModelView) -> tuple[Choice, str]:
        """Return what computes the products of fused layers, and the type in which their weights are stored."""
        # float32 stands for the dtype of the model
        stored = view.dtype if self._weights == "float32" else STORED[self._weights]
        return products_of(view.adapter, view.dtype), str(stored).removeprefix("torch.")

    def encoder(self, view: ModelView) -> Encoder:
        """Return the encoder of eval mode.

        Raises:
            BackendUnavailableError: fused layers were requested and are no longer supported.
        """
        fused, reason = self._find(view, pack=True)
        if self._layers == "auto" and (reason or "fused") not in self._logged:
            self._logged.add(reason or "fused")
            _log(view, reason)
        return family_encoder(view) if fused is None else fused

    def _find(self, view: ModelView, *, pack: bool) -> tuple[Encoder | None, str | None]:
        """Return the encoder with fused layers, if `pack` is set, and the reason against them or None.

        Raises:
            BackendUnavailableError: they were requested and are not supported.
        """
        if self._layers == "family":
            return None, REQUESTED
        if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return None, "autocast or torch.compile is active"
        encoder, reason, stored = None, None, STORED[self._weights]
        if (kind := view.device.type) != "cpu":
            reason = f"fused layers run on the CPU, the model is on {kind!r}"
        elif view.replica_reason is not None:
            reason = view.replica_reason
        elif pack:
            encoder, reason = self.fused.get_or_pack(view.adapter, view.backbone, stored)
        else:
            reason = self.fused.unsupported_reason(view.adapter, view.backbone, stored)
        if reason and self._layers == "fused":
            narrow = "" if stored == torch.float32 else "weights='float32', or layers "
            raise BackendUnavailableError(f"layers 'fused' cannot run here: {reason}; use {narrow}'auto' or 'family'")
        return encoder, reason


def _log(view: ModelView, reason: str | None) -> None:
    """Log which layers 'auto' chose, as a warning if a float32 model runs on torch's own products."""
    if reason:
        logger.info("layers 'auto' chose 'family': %s", reason)
        return
    products = products_of(view.adapter, view.dtype)
    level = logging.WARNING if products.name == "torch" and view.dtype == torch.float32 else logging.INFO
    logger.log(level, "layers 'auto' chose 'fused', products by %r: %s", products.name, products.reason)
