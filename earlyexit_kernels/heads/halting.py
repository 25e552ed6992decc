"""Halting output of an exit: a small network for the logit of the probability to stop at its layer.

PALBERT: Teaching ALBERT to Ponder. Nikita Balagansky, Daniil Gavrilov. NeurIPS 2022, arXiv 2204.03276: "Lambda layers".
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LinearWithInitialBias(nn.Linear):
    """Linear to one number with a given initial bias, which the model's ``_init_weights`` sets.

    Args:
        size: of the input.
        initial_bias: value of the bias before training.
    """

    def __init__(self, size: int, initial_bias: float) -> None:
        super().__init__(size, 1)
        self.initial_bias = initial_bias


class HaltingHead(nn.Module):
    """Map features ``[B, F]`` to halting logits s ``[B]``, with lambda = sigmoid(s).

    Args:
        size: F.
        layers: 1 for one linear; n >= 2 for n hidden layers of the input's width with tanh, and a linear.
        reads: ``"single"``, ``"concat"`` or ``"diff"``: the features, these and those of the previous exit, or the
            difference.
        bias: initial bias of the linear.
    """

    def __init__(self, size: int, layers: int, reads: str, bias: float) -> None:
        super().__init__()
        self.reads = reads
        size = 2 * size if reads == "concat" else size
        self.hidden = nn.ModuleList(nn.Linear(size, size) for _ in range(layers if layers > 1 else 0))
        self.out = LinearWithInitialBias(size, bias)

    def inputs(self, features: Tensor, previous: Tensor | None) -> Tensor:
        """Return the input of the network, ``[B, F]``, or ``[B, 2 F]`` with ``"concat"``.

        Args:
            features: ``[B, F]`` of this exit.
            previous: ``[B, F]`` of the previous exit, zeros at the first; unused with ``"single"``.
        """
        if self.reads == "single":
            return features
        assert previous is not None
        return torch.cat((features, previous), dim=-1) if self.reads == "concat" else features - previous

    def forward(self, x: Tensor) -> Tensor:
        """Return the halting logit ``[B]`` for what `inputs` returned, after dropout in training."""
        for layer in self.hidden:
            x = torch.tanh(layer(x))
        return self.out(x)[:, 0]
