"""What an adapter says of a model family: where its parts are. Names only; the family's own code does the numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class StockHead:
    """The family's classification head: first token -> dense -> activation -> dropout -> linear.

    Attributes:
        dense, out, dropout: dotted names in the stock ``...ForSequenceClassification`` model.
        activation: after the dense module.
        dropout_before_dense: whether the head drops out before the dense module too.
    """

    dense: str
    out: str = "classifier"
    dropout: str = "dropout"
    activation: str = "tanh"
    dropout_before_dense: bool = False


@dataclass(frozen=True)
class LayerNames:
    """Where the parts of one encoder layer are, dotted, for layers of the original form.

    That form is ``y = norm(x + out(attend(query x, key x, value x)))``, then ``norm(y + outer(activation(inner y)))``.
    """

    query: str = "attention.self.query"
    key: str = "attention.self.key"
    value: str = "attention.self.value"
    attention_out: str = "attention.output.dense"
    attention_norm: str = "attention.output.LayerNorm"
    inner: str = "intermediate.dense"
    activation: str = "intermediate.intermediate_act_fn"
    outer: str = "output.dense"
    norm: str = "output.LayerNorm"


def single(layer: nn.Module) -> Sequence[nn.Module]:
    """A layer that is one encoder layer."""
    return (layer,)


def as_wide(backbone: nn.Module) -> None:
    """The linear of embeddings as wide as the layers: none."""


@dataclass(frozen=True)
class BackboneAdapter:
    """One family of encoders.

    Attributes:
        model_type: of the family's config.
        base: name of the encoder in the stock classifier.
        head: the stock classification head.
        embed: ``(backbone, ids [1, T], positions [1, T], types [1, T]) -> [1, T, E]``.
        layers: ``backbone -> L`` callables ``layer(hidden, None, plan=...)``, in order of use.
        positions: ``(backbone, input_ids [N, S]) -> [N, S]`` as the stock model computes them, on the padded ids.
        longest: ``config ->`` longest row in tokens.
        names: of the parts of an encoder layer.
        parts: ``layer ->`` the encoder layers it runs one after the other; mostly itself alone.
        shares_layers: one layer is used many times.
        widen: ``backbone ->`` the linear from the embeddings' E to the layers' H, or None where they are the same.
        embeddings: dotted name of the module that `embed` calls.
    """

    model_type: str
    base: str
    head: StockHead
    embed: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
    layers: Callable[[nn.Module], Sequence[Callable[..., Any]]]
    positions: Callable[[nn.Module, Tensor], Tensor]
    longest: Callable[[Any], int]
    names: LayerNames = LayerNames()
    parts: Callable[[nn.Module], Sequence[nn.Module]] = single
    shares_layers: bool = False
    widen: Callable[[nn.Module], nn.Linear | None] = as_wide
    embeddings: str = "embeddings"

    def first_states(self, backbone: nn.Module, ids: Tensor, positions: Tensor, types: Tensor) -> Tensor:
        """What layer 1 reads, ``[1, T, H]`` for ``[1, T]`` each."""
        embedded, widen = self.embed(backbone, ids, positions, types), self.widen(backbone)
        return embedded if widen is None else widen(embedded)


def check_parts(adapter: BackboneAdapter, backbone: nn.Module) -> None:
    """Check that an adapter names every part of a backbone that has weights; a part it lacks would never run.

    A backbone of pre-norm layers is refused so, since nothing would apply the norm after its last layer.

    Raises:
        ValueError: naming the modules.
    """
    parts: list[Any] = [backbone.get_submodule(adapter.embeddings), adapter.widen(backbone), *adapter.layers(backbone)]
    named = {id(p) for part in parts if part is not None for p in part.parameters()}
    left = [name for name, p in backbone.named_parameters() if id(p) not in named]
    if left:
        modules = sorted({name.rpartition(".")[0] or name for name in left})
        raise ValueError(
            f"the adapter of {adapter.model_type!r} doesn't use {', '.join(modules)} of {type(backbone).__name__}, so "
            "its exits would answer without them; expected embeddings, an optional linear that widens them, and layers "
            "that end in their own norm (post-norm)"
        )


def column_positions(backbone: nn.Module, input_ids: Tensor) -> Tensor:
    """Positions by column, ``[N, S]``."""
    return torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)


def position_limit(config: Any) -> int:
    """Longest row where positions start at 0."""
    return config.max_position_embeddings


def encoder_layers(backbone: nn.Module) -> Sequence[nn.Module]:
    """The layers of the common ``encoder.layer`` list."""
    return backbone.encoder.layer  # type: ignore[union-attr, return-value]


def embed_with_types(backbone: nn.Module, ids: Tensor, positions: Tensor, types: Tensor) -> Tensor:
    """Embeddings that take token types."""
    return backbone.embeddings(input_ids=ids, position_ids=positions, token_type_ids=types)  # type: ignore[operator]
