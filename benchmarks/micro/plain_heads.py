"""The exits in plain torch on padded tokens ``[B, S, H]``, as a user writes them, on the parameters of an `ExitHeads`.

Each takes the heads, the tokens and, for the halting exit, the features of the exit before, and gives the logits
``[B, C]`` and the scalar of its exit ``[B]``, or None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.micro.plain_exits import Exit

#: ``(heads, tokens, *memory) -> logits and scalar``.
PlainHead: TypeAlias = Callable[..., Exit]


def linear(heads: Any, padded: Tensor) -> Exit:
    """A linear on the mean."""
    return heads.out[0](padded.mean(dim=1)), None


def family_features(heads: Any, padded: Tensor) -> Tensor:
    """BERT's own: the first token, dense, tanh."""
    return torch.tanh(heads.dense[0](padded[:, 0]))


def family(heads: Any, padded: Tensor) -> Exit:
    """BERT's own form."""
    return heads.out[0](family_features(heads, padded)), None


def attended(module: Any, padded: Tensor) -> Tensor:
    """Every token narrowed, then self-attention inside the row, ``[B, S, W]``."""
    narrow = torch.tanh(module.narrow(padded))
    shape = (*narrow.shape[:2], module.heads, -1)
    q, k, v = (part(narrow).view(shape).transpose(1, 2) for part in (module.query, module.key, module.value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(narrow.shape)


def attention(heads: Any, padded: Tensor) -> Exit:
    """FastBERT's exit."""
    module = heads.attention[0]
    return heads.out[0](torch.tanh(module.dense(attended(module.attention, padded)[:, 0]))), None


def halting(heads: Any, padded: Tensor, previous: Tensor) -> Exit:
    """The family's exit with PALBERT's halting output: hidden layers over these features and those before."""
    features = family_features(heads, padded)
    x = torch.cat((features, previous), dim=-1)
    for layer in heads.halting[0].hidden:
        x = torch.tanh(layer(x))
    return heads.out[0](features), torch.sigmoid(heads.halting[0].out(x)[:, 0])


def uncertainty(heads: Any, padded: Tensor) -> Exit:
    """The family's exit with BERxiT's uncertainty output."""
    features = family_features(heads, padded)
    return heads.out[0](features), torch.sigmoid(heads.uncertainty[0](features)[:, 0])


def gate(heads: Any, padded: Tensor) -> Tensor:
    """SmartBERT's gate: the probability ``[B]`` to skip the layer."""
    module = heads.gates[0]
    return torch.sigmoid(module.out(attended(module.attention, padded)[:, 0])[:, 0])
