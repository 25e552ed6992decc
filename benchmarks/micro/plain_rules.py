"""The steps of the rules in plain torch, as a user writes them, without the package."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.micro.decisions import DEPTH

State: TypeAlias = Sequence[Tensor]
#: ``(criterion, z [B, C], aux [B] or None, state, layer) -> answer [B, C], leaves [B], state``.
Step: TypeAlias = Callable[[Any, Tensor, Any, State, int], tuple[Tensor, Tensor, State]]


def entropy_of(z: Tensor) -> Tensor:
    """Entropy ``[B]`` in nats of the class probabilities."""
    return torch.special.entr(z.softmax(-1)).sum(-1)


def _entropy(rule, z, aux, state, layer):
    return z, entropy_of(z) < rule.threshold, state


def _max_probability(rule, z, aux, state, layer):
    return z, z.softmax(-1).amax(-1) >= rule.threshold, state


def _margin(rule, z, aux, state, layer):
    top = z.softmax(-1).topk(2).values
    return z, top[:, 0] - top[:, 1] >= rule.threshold, state


def _patience(rule, z, aux, state, layer):
    last, count = state
    label = z.argmax(-1)
    count = torch.where(label == last, count + 1, 0)
    return z, count >= rule.patience, (label, count)


def _q_exit(rule, z, aux, state, layer):
    left = state[0] * (1 - aux)
    return z, 1 - left > rule.q, (left,)


def _sampled_exit(rule, z, aux, state, layer):
    left, drawn = state
    left = left * (1 - aux)
    return z, 1 - left > drawn, (left, drawn)


def _expectation(rule, z, aux, state, layer):
    left, mean = state
    mean = mean + (left if layer == DEPTH else left * aux)[:, None] * z.softmax(-1)
    return mean.log(), torch.zeros_like(aux, dtype=torch.bool), (left * (1 - aux), mean)


def _voting(rule, z, aux, state, layer):
    votes, latest = state
    mine = F.one_hot(z.argmax(-1), z.shape[-1]).bool()
    votes, latest = votes + mine, torch.where(mine, layer, latest)
    wins = F.one_hot((votes * (DEPTH + 1) + latest).argmax(-1), z.shape[-1])
    share = votes + 1 + wins / 2
    answer = (share / share.sum(-1, keepdim=True)).log()
    return answer, votes.amax(-1) >= rule.threshold * layer**rule.gamma, (votes, latest)


def _dact(rule, z, aux, state, layer):
    before, a = state
    a = before[:, None] * z.softmax(-1) + (1 - before)[:, None] * a
    p, to_come = (1 - aux) * before, DEPTH - layer
    top = a.topk(2).values
    leaves = top[:, 0] * (1 - p) ** to_come > top[:, 1] + p * to_come
    return a.log(), leaves, (p, a)


def _learned(rule, z, aux, state, layer):
    return z, aux < rule.threshold, state


def _patient_confidence(rule, z, aux, state, layer):
    sure = entropy_of(z) / math.log(z.shape[-1]) < rule.threshold
    count = torch.where(sure, state[0] + 1, 0)
    return z, count >= rule.patience, (count,)


def _divergence_patience(rule, z, aux, state, layer):
    count, q = state
    p = z.softmax(-1)
    entropies = torch.special.entr((p + q) / 2) - (torch.special.entr(p) + torch.special.entr(q)) / 2
    count = torch.where(entropies.sum(-1) < rule.threshold, count + 1, 0)
    return z, count >= rule.patience, (count, p)


def _hidden_cosine(rule, z, aux, state, layer):
    return z, aux >= rule.threshold, state


def _energy(rule, z, aux, state, layer):
    return z, torch.sigmoid(-z.logsumexp(-1)) < rule.threshold, state


STEPS: dict[str, Step] = {
    "entropy": _entropy,
    "max_probability": _max_probability,
    "margin": _margin,
    "patience": _patience,
    "q_exit": _q_exit,
    "sampled_exit": _sampled_exit,
    "expectation": _expectation,
    "voting": _voting,
    "dact": _dact,
    "learned": _learned,
    "patient_confidence": _patient_confidence,
    "divergence_patience": _divergence_patience,
    "hidden_cosine": _hidden_cosine,
    "energy": _energy,
}


def first_state(rule: Any, z: Tensor, keys: Tensor | None) -> State:
    """What a rule keeps of its rows before layer 1; the draws of `SampledExit` are input, taken from the criterion."""
    (rows, classes), device = z.shape, z.device
    ones, zeros = z.new_ones(rows), torch.zeros(rows, dtype=torch.int64, device=device)
    if rule.name == "sampled_exit":
        return ones, rule.new_state(rows, device, classes, keys)[1].to(z.dtype)
    table = torch.zeros_like(z)
    counts = torch.zeros_like(z, dtype=torch.int64)
    starts = {
        "patience": (zeros - 1, zeros),
        "q_exit": (ones,),
        "expectation": (ones, table),
        "voting": (counts, counts),
        "dact": (ones, table),
        "patient_confidence": (zeros,),
        "divergence_patience": (zeros, table + math.nan),
    }
    return starts.get(rule.name, ())
