"""Numbers that criteria compare with a threshold, at each exit of logits ``[N, L, C]``, from their definitions."""

from __future__ import annotations

import torch
from torch import Tensor


def entropy(z: Tensor) -> Tensor:
    """Entropy in nats."""
    p = z.double().softmax(dim=-1)
    return -torch.special.xlogy(p, p).sum(dim=-1)


def divergence(z: Tensor) -> Tensor:
    """Jensen-Shannon divergence of successive exits, ``[N, L - 1]``."""
    p, q = z[:, 1:].double().softmax(dim=-1), z[:, :-1].double().softmax(dim=-1)
    return (torch.special.xlogy(p, 2 * p / (p + q)) + torch.special.xlogy(q, 2 * q / (p + q))).nansum(dim=-1) / 2


def votes(z: Tensor, gamma: float) -> Tensor:
    """Votes of the leading class after l layers, divided by l^gamma."""
    layers = range(1, z.shape[1] + 1)
    counts = [torch.nn.functional.one_hot(z[:, :k].argmax(dim=-1), z.shape[-1]).sum(dim=1) for k in layers]
    return torch.stack([c.amax(dim=-1) / k**gamma for k, c in zip(layers, counts, strict=True)], dim=1)


def survival(aux: dict[str, Tensor]) -> Tensor:
    """Probability of not having stopped."""
    return (1 - aux["halting"].double().sigmoid()).cumprod(dim=1)
