"""The input of layer 1 beside layers on the vector kernels, no value of which depends on the other tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from earlyexit_kernels.backbones import BackboneAdapter, EmbeddingSum
from earlyexit_kernels.backbones.forms import hooked
from earlyexit_kernels.backbones.forms_embedding import read_embedding_sum
from earlyexit_kernels.backends import extension_function
from earlyexit_kernels.core.encoder import Embed
from earlyexit_kernels.errors import Unsupported
from earlyexit_kernels.ops import raw


def embedding_modules(adapter: BackboneAdapter, backbone: Any) -> list[nn.Module]:
    """Return the modules that `embed_alone` reads."""
    embeddings = [backbone.embeddings] if type(adapter.embed) is EmbeddingSum else []
    widen = adapter.widen(backbone)
    return embeddings if widen is None else [*embeddings, widen]


def embed_alone(adapter: BackboneAdapter, backbone: nn.Module) -> Embed:
    """Return what computes the input of layer 1 in float32.

    Modules that the kernels do not compute stay, and round as they do.

    Args:
        adapter, backbone: of the model, whose `embedding_modules` do not change afterwards.
    """
    embed: Embed = Summed.of(adapter, backbone) or functools.partial(adapter.embed, backbone)
    widen = adapter.widen(backbone)
    if widen is None:
        return embed
    multiply = raw("first_tokens_linear", "auto", "cpu")
    plain = type(widen) is nn.Linear and widen.bias is not None and not hooked(widen)
    return Widened(embed, widen, multiply if plain else None)


@dataclass(frozen=True)
class Summed:
    """Embeddings that are a norm of a sum, by the vector kernels.

    Attributes:
        run: ``(ids, positions, types) ->`` the embeddings, an object of the extension that reads the weights in place.
    """

    run: Callable[[Tensor, Tensor, Tensor], Tensor]

    @staticmethod
    def of(adapter: BackboneAdapter, backbone: nn.Module) -> Summed | None:
        """Return the embeddings of a backbone, or None where the kernels do not compute them."""
        try:
            weights = read_embedding_sum(adapter, backbone)
        except Unsupported:
            return None
        tensors = [x for x in weights if isinstance(x, Tensor)]
        fit = all(x.dtype == torch.float32 and x.is_contiguous() for x in tensors)
        return Summed(cast(Any, extension_function("Embedding"))(*weights)) if fit else None

    def __call__(self, ids: Tensor, positions: Tensor, types: Tensor) -> Tensor:
        """``[1, T] -> [1, T, E]``"""
        return self.run(ids, positions, types)


@dataclass(frozen=True)
class Widened:
    """Embeddings and the linear that makes them as wide as the layers.

    Attributes:
        embed: the embeddings.
        widen: the linear.
        multiply: the op `first_tokens_linear`, or None: the linear runs as a module.
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
