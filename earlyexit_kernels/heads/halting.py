"""The halting output of an exit: a small network that gives the logit of the probability to stop here.

PALBERT: Teaching ALBERT to Ponder. Nikita Balagansky, Daniil Gavrilov. NeurIPS 2022, arXiv 2204.03276: "Lambda layers".
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class StartsAt(nn.Linear):
    """A linear to one number whose bias doesn't start at 0; the model's ``_init_weights`` sets it.

    Args:
        size: of the input.
        first_bias: where the bias starts.
    """

    def __init__(self, size: int, first_bias: float) -> None:
        super().__init__(size, 1)
        self.first_bias = first_bias


class HaltingHead(nn.Module):
    """``features [B, F] -> s [B]``, with lambda = sigmoid(s).

    Args:
        size: F.
        layers: 1 for one linear; n >= 2 for n hidden layers of the input's width with tanh, and a linear.
        reads: ``"single"``, ``"concat"`` or ``"diff"``: the features, these and the exit before's, or the difference.
        bias: of the linear at the start.
    """

    def __init__(self, size: int, layers: int, reads: str, bias: float) -> None:
        super().__init__()
        self.reads = reads
        size = 2 * size if reads == "concat" else size
        self.hidden = nn.ModuleList(nn.Linear(size, size) for _ in range(layers if layers > 1 else 0))
        self.out = StartsAt(size, bias)

    def inputs(self, features: Tensor, previous: Tensor | None) -> Tensor:
        """What the network reads, ``[B, F]``, or ``[B, 2 F]`` with ``"concat"``.

        Args:
            features: ``[B, F]`` of this exit.
            previous: ``[B, F]`` of the exit before, zeros at the first; unused with ``"single"``.
        """
        if self.reads == "single":
            return features
        assert previous is not None
        return torch.cat((features, previous), dim=-1) if self.reads == "concat" else features - previous

    def forward(self, x: Tensor) -> Tensor:
        """The logit ``[B]`` of what `inputs` gives, after dropout in training."""
        for layer in self.hidden:
            x = torch.tanh(layer(x))
        return self.out(x)[:, 0]
