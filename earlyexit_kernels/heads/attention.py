"""Small networks on the tokens of a row: attention exits, skip gates, and projections for contrastive training.

FastBERT: a Self-distilling BERT with Adaptive Inference Time. Weijie Liu et al. ACL 2020, arXiv 2004.02178 (exits).
SmartBERT: A Promotion of Dynamic Early Exiting Mechanism for Accelerating BERT Inference. Boren Hu et al. IJCAI 2023,
arXiv 2303.09266 (exits, gates, projections).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from earlyexit_kernels.heads.config import GATE_HEADS
from earlyexit_kernels.heads.halting import LinearWithInitialBias
from earlyexit_kernels.types import RowStates


class TokenAttention(nn.Module):
    """Project each token to a smaller width, then apply self-attention within each row.

    There is no residual, norm or output projection.

    Args:
        size: H, width of the tokens.
        width: W, width of the attention.
        heads: of the attention.
        dropout: of the attention, in training.
    """

    def __init__(self, size: int, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.narrow = nn.Linear(size, width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, states: RowStates) -> tuple[Tensor, Tensor]:
        """Return the projected tokens and the output of the attention, both ``[..., W]``."""
        narrow = torch.tanh(self.narrow(states.tokens))
        q, k, v = (part(narrow).unflatten(-1, (self.heads, -1)) for part in (self.query, self.key, self.value))
        attended = states.attend(q, k, v, self.dropout if self.training else 0.0)
        return narrow, attended.reshape(narrow.shape)


class AttentionFeatures(nn.Module):
    """Exit without its last linear: attention, pooling, dense, tanh.

    Args:
        size: H, width of the tokens.
        width: W, width of the features.
        heads: of the attention.
        dropout: of the attention, in training.
        pooling: ``"first"``, ``"mean"`` or ``"last"``.
    """

    def __init__(self, size: int, width: int, heads: int, dropout: float, pooling: str) -> None:
        super().__init__()
        self.pooling = pooling
        self.attention = TokenAttention(size, width, heads, dropout)
        self.dense = nn.Linear(width, width)

    def forward(self, states: RowStates) -> tuple[Tensor, Tensor]:
        """Return features ``[B, W]`` and the projected tokens ``[..., W]``."""
        narrow, attended = self.attention(states)
        pooled = states.pool(attended, self.pooling).to(attended.dtype)
        return torch.tanh(self.dense(pooled)), narrow


class SkipGate(nn.Module):
    """Gate before a layer: map the layer's input to the logit of the probability to skip the layer.

    Args:
        size: H, width of the tokens.
        width: W, width of the attention.
        dropout: of the attention, in training.
        pooling: ``"first"``, ``"mean"`` or ``"last"``.
        bias: initial bias of the logit.
    """

    def __init__(self, size: int, width: int, dropout: float, pooling: str, bias: float) -> None:
        super().__init__()
        self.pooling = pooling
        self.attention = TokenAttention(size, width, GATE_HEADS, dropout)
        self.out = LinearWithInitialBias(width, bias)

    def forward(self, states: RowStates) -> Tensor:
        """Return the gate logits ``[B]``."""
        _, attended = self.attention(states)
        pooled = states.pool(attended, self.pooling).to(attended.dtype)
        return self.out(pooled)[:, 0]


class Projection(nn.Module):
    """Project tokens ``[T, F]`` to ``[T, P]`` for contrastive training: linear, norm, tanh, linear.

    Args:
        size: F.
        width: P.
    """

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.narrow = nn.Linear(size, width)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the projections ``[T, P]``."""
        return self.out(torch.tanh(self.norm(self.narrow(tokens))))
