"""Reference implementations of the exit networks, with padding and masks, and of a stock encoder by layers.

They use the parameters of a model, but no code of the package.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from support.models import encoder_of
from torch import Tensor

#: Attention heads of a gate, as in SmartBERT.
GATE_HEADS = 2


def linear(module: Any, x: Tensor) -> Tensor:
    return x @ module.weight.T + module.bias


def pooled(x: Tensor, mask: Tensor, pooling: str | None) -> Tensor:
    """Pool padded tokens ``[N, S, H]`` to ``[N, H]``: the first, or the mean over the mask ``[N, S]``."""
    if pooling != "mean":
        return x[:, 0]
    kept = mask[:, :, None].to(x)
    return (x * kept).sum(1) / kept.sum(1)


def attended(module: Any, x: Tensor, mask: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Return the narrowed tokens and the attention output, both ``[N, S, W]``."""
    narrow = torch.tanh(linear(module.narrow, x))
    n, s, w = narrow.shape
    projections = (linear(projection, narrow) for projection in (module.query, module.key, module.value))
    q, k, v = (x.view(n, s, heads, w // heads).transpose(1, 2) for x in projections)
    scores = q @ k.transpose(2, 3) / math.sqrt(w // heads)
    shares = scores.masked_fill(~mask.bool()[:, None, None, :], -math.inf).softmax(dim=-1)
    return narrow, (shares @ v).transpose(1, 2).reshape(n, s, w)


def attention_exit(heads: Any, layer: int, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits ``[N, C]`` of the attention exit after 1-based `layer`, and its narrowed tokens."""
    module = heads.attention[layer - 1]
    narrow, context = attended(module.attention, x, mask, heads.config.attention_heads)
    features = torch.tanh(linear(module.dense, pooled(context, mask, heads.config.pooling)))
    return linear(heads.out[layer - 1], features), narrow


def gate(heads: Any, layer: int, x: Tensor, mask: Tensor) -> Tensor:
    """Return the logits ``[N]`` of the probability to skip 1-based `layer`, from its input."""
    module = heads.gates[layer - 1]
    _, context = attended(module.attention, x, mask, GATE_HEADS)
    return linear(module.out, pooled(context, mask, heads.config.pooling))[:, 0]


def projected(module: Any, x: Tensor) -> Tensor:
    """Apply linear, norm over the width, tanh and linear."""
    y = linear(module.narrow, x)
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + module.norm.eps).sqrt()
    return linear(module.out, torch.tanh(y * module.norm.weight + module.norm.bias))


def embedded(base: Any, ids: Tensor) -> Tensor:
    """Return the input of the first layer of a stock classifier, for rows without padding."""
    encoder = encoder_of(base)
    hidden = encoder.embeddings(input_ids=ids)
    narrow = getattr(encoder.encoder, "embedding_hidden_mapping_in", None)
    return hidden if narrow is None else narrow(hidden)


def layers_of(base: Any) -> list[Any]:
    """Return the layers of a stock encoder in order, as functions ``hidden -> hidden`` for rows without padding."""
    encoder = encoder_of(base).encoder
    if hasattr(encoder, "layer"):
        modules = list(encoder.layer)
    else:
        depth, groups = base.config.num_hidden_layers, encoder.albert_layer_groups
        modules = [groups[i * len(groups) // depth] for i in range(depth)]

    def call(module: Any) -> Any:
        def run(hidden: Tensor) -> Tensor:
            out = module(hidden, None)
            return out[0] if isinstance(out, tuple) else out

        return run

    return [call(module) for module in modules]


def attended_by_row(
    q: Tensor, k: Tensor, v: Tensor, plan: Any, scaling: float | None, dropout: float, *, causal: bool = False
) -> Tensor:
    """Return the attention within rows of packed tokens ``[T, heads, D]``; tokens outside of rows are NaN."""
    out = torch.full_like(q, math.nan)
    for start, end in itertools.pairwise(plan.offsets.tolist()):
        assert end - start <= plan.longest
        if start < end:
            row = [x[start:end].transpose(0, 1)[None] for x in (q, k, v)]
            out[start:end] = F.scaled_dot_product_attention(*row, is_causal=causal, scale=scaling)[0].transpose(0, 1)
    return out
