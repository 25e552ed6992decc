"""The path of fused layers."""

from __future__ import annotations

import logging

from earlyexit_kernels.core.encoder import Encoder
from earlyexit_kernels.core.loop import Pass
from earlyexit_kernels.core.paths import Found, refusal
from earlyexit_kernels.core.view import Inputs, View
from earlyexit_kernels.cpu.kernels import STORED
from earlyexit_kernels.cpu.layers import FusedLayers, products_of
from earlyexit_kernels.errors import Unsupported

logger = logging.getLogger("earlyexit_kernels")


class Fused:
    """Answers by fused layers; a `core.paths.Path`. Copies and pickles start without packed weights.

    Under path ``"auto"`` a layer that cannot be fused runs as the family's own.

    Attributes:
        layers: the packed weights.
    """

    name = "fused"

    def __init__(self) -> None:
        self.layers = FusedLayers()
        self._said: set[str] = set()

    def check(self, view: View) -> Found:
        """Return how the layers would run; packs nothing."""
        _check_here(view)
        reasons = self.layers.refusals(view.adapter, view.backbone, STORED[view.settings.weights])
        first = next(iter(reasons.values()), "")
        if first and (view.settings.path == self.name or len(reasons) == len(view.layers)):
            raise Unsupported(first)
        own = f", except in {_own_layers(reasons)}" if first else ""
        # float32 stands for the dtype of the model
        stored = view.dtype if view.settings.weights == "float32" else STORED[view.settings.weights]
        name, why = products_of(view.adapter, view.dtype)
        return Found(f"they are supported and faster{own}", name, why, str(stored).removeprefix("torch."))

    def encoder(self, view: View) -> Encoder:
        """Return the encoder, which checks and packs a layer when it is reached."""
        _check_here(view)

        def report(number: int, reason: str | None) -> None:
            if reason is not None and view.settings.path == self.name:
                raise refusal(view, reason)
            if reason is not None and reason not in self._said:
                self._said.add(reason)
                logger.info("path 'auto' runs layer %d as the family's own: %s", number, reason)

        return self.layers.encoder(view.adapter, view.backbone, STORED[view.settings.weights], report)

    def begin(self, view: View, inputs: Inputs) -> Pass:
        """Return the pass of a batch."""
        return Pass(view, self.encoder(view), inputs)


def _check_here(view: View) -> None:
    if (kind := view.device.type) != "cpu":
        raise Unsupported(f"fused layers run on the CPU, the model is on {kind!r}")
    if view.replica_reason:
        raise Unsupported(view.replica_reason)


def _own_layers(reasons: dict[int, str]) -> str:
    """Return which layers run as the family's own, and why."""
    numbers = ", ".join(map(str, reasons))
    return f"layer{'s' * (len(reasons) > 1)} {numbers}: {next(iter(reasons.values()))}"
