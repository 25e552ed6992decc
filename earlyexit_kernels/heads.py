"""Exit heads: what turns the hidden states after a layer into the logits of its exit, and the bank of L of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

POOLINGS = (None, "first", "mean")


@dataclass(frozen=True)
class HeadConfig:
    """Shape of the exit heads, saved with the model.

    Attributes:
        pooling: None for the family's own form (first token, dense, activation, dropout, linear; one dense module
            for all exits), ``"first"`` or ``"mean"`` for a linear on the pooled hidden state.
        activation: after the dense module, a name of transformers' table; unused without one.
        dropout: probability before the linear, in training.
        dropout_before_dense: the RoBERTa family and ELECTRA drop out there too.
        halting: add a halting output for each exit.
    """

    pooling: str | None = None
    activation: str = "tanh"
    dropout: float = 0.0
    dropout_before_dense: bool = False
    halting: bool = False

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling: expected one of {POOLINGS}, got {self.pooling!r}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data; ``HeadConfig(**data)`` reads it back."""
        return asdict(self)


@dataclass(frozen=True)
class FusedExit:
    """What `ops.exit_step` needs to finish one exit: where to pool, and the linear head."""

    hidden: Tensor
    pooling: str
    weight: Tensor
    bias: Tensor
    aux: Mapping[str, Tensor]


class ExitHeads(nn.Module):
    """The exits of all L layers.

    Args:
        config: shape of the heads.
        hidden_size, classes, depth: H, C and L.
    """

    def __init__(self, config: HeadConfig, hidden_size: int, classes: int, depth: int) -> None:
        super().__init__()
        self.config = config
        self.dense = nn.Linear(hidden_size, hidden_size) if config.pooling is None else None
        self.activation = ACT2FN[config.activation]
        self.out = nn.ModuleList(nn.Linear(hidden_size, classes) for _ in range(depth))
        self.halting = nn.ModuleList(nn.Linear(hidden_size, 1) for _ in range(depth)) if config.halting else None

    @property
    def aux_names(self) -> tuple[str, ...]:
        """Scalars the heads produce beside logits."""
        return ("halting",) if self.config.halting else ()

    def forward(self, layer: int, hidden: Tensor, offsets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits ``[B, C]`` and raw scalars ``[B]`` of 1-based `layer`, differentiable, with dropout in training.

        In eval mode the last linear is float32, as in the fused op: a half-precision one can overflow.

        Args:
            hidden: packed tokens ``[T, H]``.
            offsets: ``[B + 1]`` int32.
        """
        features = self._features(self._pool(hidden, offsets))
        out: Any = self.out[layer - 1]
        if self.training:
            return out(self._drop(features)), self._aux(layer, features)
        with torch.autocast(hidden.device.type, enabled=False):
            logits = F.linear(features.float(), out.weight.float(), out.bias.float())
        return logits, self._aux(layer, features)

    def fused(self, layer: int, hidden: Tensor, offsets: Tensor) -> FusedExit:
        """The same exit for inference, its last linear left to the fused op.

        Args:
            hidden: packed tokens ``[T, H]``.
            offsets: ``[B + 1]`` int32.
        """
        out: Any = self.out[layer - 1]
        if self.dense is None and self.halting is None:
            assert self.config.pooling is not None
            return FusedExit(hidden.to(out.weight.dtype), self.config.pooling, out.weight.contiguous(), out.bias, {})
        features = self._features(self._pool(hidden, offsets))
        return FusedExit(
            features.to(out.weight.dtype), "none", out.weight.contiguous(), out.bias, self._aux(layer, features)
        )

    def _pool(self, hidden: Tensor, offsets: Tensor) -> Tensor:
        if self.config.pooling == "mean":
            mean = torch.segment_reduce(hidden.float(), "mean", offsets=offsets.long(), axis=0)
            linear_follows = self.dense is None and self.halting is None
            return mean if linear_follows and not self.training else mean.to(hidden.dtype)
        return hidden.index_select(0, offsets[:-1])

    def _features(self, pooled: Tensor) -> Tensor:
        if self.dense is None:
            return pooled
        if self.config.dropout_before_dense:
            pooled = self._drop(pooled)
        return self.activation(self.dense(pooled))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config.dropout, self.training)

    def _aux(self, layer: int, features: Tensor) -> dict[str, Tensor]:
        if self.halting is None:
            return {}
        return {"halting": self.halting[layer - 1](features)[:, 0]}
