"""Exit heads: what turns the hidden states after a layer into the logits of its exit, and the bank of L of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

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


class LinearExits(NamedTuple):
    """All exits where each is one linear on the pooled hidden state: how to pool, and weight and bias by layer."""

    pooling: str
    weights: list[tuple[Tensor, Tensor]]


class FusedExit(NamedTuple):
    """One exit up to its last linear: a vector ``[B, H]`` for each row, that linear, and the raw scalars."""

    features: Tensor
    weight: Tensor
    bias: Tensor
    aux: dict[str, Tensor]


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

    def linear_exits(self, dtype: torch.dtype) -> LinearExits | None:
        """The exits as plain linears on hidden states of this dtype, or None where they are more than that.

        Looked up once a batch: at one row a batch, looking modules up at every layer shows in the latency.
        """
        if self.config.pooling is None or self.halting is not None:
            return None
        outs: Any = self.out
        weights = [(out.weight.contiguous(), out.bias) for out in outs]
        return LinearExits(self.config.pooling, weights) if weights[0][0].dtype == dtype else None

    def fused(self, layer: int, hidden: Tensor, offsets: Tensor) -> FusedExit:
        """Any exit for inference, its last linear left to the fused op.

        Args:
            hidden: packed tokens ``[T, H]``.
            offsets: ``[B + 1]`` int32.
        """
        out: Any = self.out[layer - 1]
        features = self._features(self._pool(hidden, offsets))
        aux = self._aux(layer, features)
        return FusedExit(features.to(out.weight.dtype), out.weight.contiguous(), out.bias, aux)

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
