"""The parts of a model that a pass reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from earlyexit_kernels.backbones import BackboneAdapter
from earlyexit_kernels.criteria import Criterion
from earlyexit_kernels.heads import ExitHeads


@dataclass(frozen=True)
class ModelView:
    """The parts of a model that a pass reads.

    Attributes:
        adapter, backbone: the encoder.
        heads: its exits.
        criterion: decides which rows leave.
        classes: C.
    """

    adapter: BackboneAdapter
    backbone: Any
    heads: ExitHeads
    criterion: Criterion
    classes: int

    @property
    def roots(self) -> tuple[nn.Module, nn.Module]:
        """The modules whose weights are read."""
        return self.backbone, self.heads

    @property
    def exit_norm(self) -> nn.Module | None:
        """The norm at the end of the encoder, which its layers do not have, or None."""
        return self.adapter.exit_norm(self.backbone)

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The L layers."""
        return self.adapter.layers(self.backbone)  # type: ignore[return-value]
