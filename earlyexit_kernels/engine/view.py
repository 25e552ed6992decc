"""The parts of a model that a pass reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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
    def device(self) -> torch.device:
        """The device of the encoder."""
        return embedding_weight(self.backbone).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the encoder."""
        return embedding_weight(self.backbone).dtype

    @property
    def replica_reason(self) -> str | None:
        """Why nothing may be made from the weights and kept, or None: they are those of a replica."""
        return "the weights of a replica of nn.DataParallel last for one batch" if is_replica(self.backbone) else None

    @property
    def exit_norm(self) -> nn.Module | None:
        """The norm at the end of the encoder, which its layers do not have, or None."""
        return self.adapter.exit_norm(self.backbone)

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The L layers."""
        return self.adapter.layers(self.backbone)  # type: ignore[return-value]


def embedding_weight(backbone: Any) -> Tensor:
    """Return the weight of the token embeddings, for its dtype and device.

    A replica of `torch.nn.DataParallel` has no parameters, so that its `device` and `dtype` raise; its modules hold
    their weights as plain attributes.
    """
    return backbone.get_input_embeddings().weight


def is_replica(module: nn.Module) -> bool:
    """Return whether a module is part of a replica that `torch.nn.DataParallel` made for one batch.

    Replicas have new modules around new tensors, share all other attributes with the model, and run in threads.
    """
    return getattr(module, "_is_replica", False)
