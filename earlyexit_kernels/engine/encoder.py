"""The encoder of a pass: what embeds the packed tokens, and the layers that run on them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from earlyexit_kernels.backbones import BackboneAdapter
from earlyexit_kernels.engine.embedding_sum import SumWeights, embedding_unsupported_reason
from earlyexit_kernels.engine.layer_parts import hooked
from earlyexit_kernels.engine.view import ModelView
from earlyexit_kernels.ops import bare_op

#: ``(ids, positions, types) ->`` the input of layer 1, ``[1, T, H]``; arguments ``[1, T]`` int64.
Embed = Callable[[Tensor, Tensor, Tensor], Tensor]


class Encoder(NamedTuple):
    """What runs before the exits.

    Attributes:
        embed: computes the input of layer 1.
        layers: L callables ``layer(hidden, plan=...)``.
    """

    embed: Embed
    layers: Sequence[Callable[..., Any]]


def family_encoder(view: ModelView) -> Encoder:
    """Return the encoder that consists of the modules of the family."""
    return Encoder(functools.partial(view.adapter.first_states, view.backbone), view.layers)


def embed_alone(adapter: BackboneAdapter, backbone: nn.Module) -> Embed:
    """Return what computes the input of layer 1 in float32 on the CPU, no value of which depends on the other tokens.

    Modules that ops do not compute stay, and round as they do.

    Args:
        adapter, backbone: of the model, whose modules do not change afterwards.
    """
    embed: Embed = Summed.of(adapter, backbone) or functools.partial(adapter.embed, backbone)
    widen = adapter.widen(backbone)
    if widen is None:
        return embed
    multiply = bare_op("first_tokens_linear", "auto", "cpu")
    plain = type(widen) is nn.Linear and widen.bias is not None and not hooked(widen)
    return Widened(embed, widen, multiply if plain else None)


@dataclass(frozen=True)
class Summed:
    """Embeddings that are a norm of a sum, in one op.

    Attributes:
        weights: float32, read in place.
        op: `ops.rows_embed`.
    """

    weights: SumWeights
    op: Callable[..., None]

    @staticmethod
    def of(adapter: BackboneAdapter, backbone: nn.Module) -> Summed | None:
        """Return the embeddings of a backbone, or None where the op does not compute them."""
        if embedding_unsupported_reason(adapter, backbone) is not None:
            return None
        weights = SumWeights.of(adapter, backbone)
        tensors = [x for x in weights if isinstance(x, Tensor)]
        fit = all(x.dtype == torch.float32 and x.is_contiguous() for x in tensors)
        return Summed(weights, bare_op("rows_embed", "auto", "cpu")) if fit else None

    def __call__(self, ids: Tensor, positions: Tensor, types: Tensor) -> Tensor:
        """``[1, T] -> [1, T, E]``"""
        tokens, words = ids.shape[1], self.weights.words
        out, ends = words.new_empty(tokens, words.shape[1]), torch.tensor([0, tokens], dtype=torch.int32)
        # the op does not read the columns of the tokens
        self.op(torch.cat((ids, positions, types, types)), *self.weights, ends, out)
        return out[None]


@dataclass(frozen=True)
class Widened:
    """Embeddings and the linear that makes them as wide as the layers.

    Attributes:
        embed: the embeddings.
        widen: the linear.
        multiply: `ops.first_tokens_linear`, or None: the linear runs as a module.
    """

    embed: Embed
    widen: nn.Linear
    multiply: Callable[..., None] | None

    def __call__(self, ids: Tensor, positions: Tensor, types: Tensor) -> Tensor:
        """``[1, T] -> [1, T, H]``"""
        embedded, widen = self.embed(ids, positions, types), self.widen
        if self.multiply is None or not embedded.dtype == widen.weight.dtype == torch.float32:
            return widen(embedded)
        ends = torch.arange(embedded.shape[1] + 1, dtype=torch.int32)
        out = embedded.new_empty(embedded.shape[1], widen.weight.shape[0])
        weight, bias = widen.weight.contiguous(), widen.bias
        self.multiply(embedded[0].contiguous(), weight, bias, ends, ends[:-1], out, "none")
        return out[None]
