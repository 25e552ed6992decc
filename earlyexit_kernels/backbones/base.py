"""Adapters: where the parts of a model family are. The family's own code computes the numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from earlyexit_kernels.arguments import choice
from earlyexit_kernels.types import FAMILY_POOLINGS


def pooling_of(config: Any, poolings: Mapping[str, str]) -> str:
    """Return the `HeadConfig.family_pooling` that the `classifier_pooling` of a config stands for in a family.

    Raises:
        ValueError: the family does not have it.
    """
    return poolings[choice(*poolings)("classifier_pooling", config.classifier_pooling)]


def as_stated(config: Any) -> Mapping[str, Any]:
    """Return no settings: those of the head do not depend on the config."""
    return {}


@dataclass(frozen=True)
class StockHead:
    """The family's classification head: pooled token -> dense -> activation -> norm -> dropout -> linear.

    Attributes:
        dense: dotted name of the dense module in the stock ``...ForSequenceClassification`` model, or None for a head
            that is a linear alone.
        out: dotted name of the last linear.
        dropout: dotted name of the dropout module, or None without one.
        activation: after the dense module.
        dropout_before_dense: whether the head applies dropout before the dense module too.
        norm: dotted name of the layer norm after the activation, or None without one.
        pooling: what of a row the head reads, as `HeadConfig.family_pooling`. Heads of causal decoders read the last
            token.
        settings: ``config ->`` the fields of `HeadConfig` that the config of the family decides.
    """

    dense: str | None
    out: str = "classifier"
    dropout: str | None = "dropout"
    activation: str = "tanh"
    dropout_before_dense: bool = False
    norm: str | None = None
    pooling: str = "first"
    settings: Callable[[Any], Mapping[str, Any]] = as_stated

    def __post_init__(self) -> None:
        choice(*FAMILY_POOLINGS)("StockHead(pooling=...)", self.pooling)


@dataclass(frozen=True)
class LayerNames:
    """Dotted names of the parts of one post-norm encoder layer.

    Such a layer computes ``y = norm(x + out(attend(query x, key x, value x)))``, then
    ``norm(y + outer(activation(inner y)))``.
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

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of the linears."""
        return self.query, self.key, self.value, self.attention_out, self.inner, self.outer


@dataclass(frozen=True)
class GatedLayerNames:
    """Dotted names of the parts of one pre-norm encoder layer with rotary positions and a gated feed-forward.

    Such a layer computes ``y = x + attention_out(attend(rotate q, rotate k, v))`` with ``q, k, v = qkv(attention_norm
    x)``, then ``y + outer(activation(a) * b)`` with ``a, b = inner(norm y)``. `qkv` is one linear, or three, where key
    and value may have fewer heads; `inner` is one, or two. The module that has `qkv` holds the width of a head as
    `head_dim`, and as `sliding_window` that of a window or None. A norm may be an `nn.Identity`. The layer takes cosine
    and sine as `position_embeddings`, which `BackboneAdapter.layer_arguments` computes.
    """

    attention_norm: str = "attn_norm"
    qkv: str | tuple[str, str, str] = "attn.Wqkv"
    attention_out: str = "attn.Wo"
    norm: str = "mlp_norm"
    inner: str | tuple[str, str] = "mlp.Wi"
    activation: str = "mlp.act"
    outer: str = "mlp.Wo"

    def of(self, part: str) -> tuple[str, ...]:
        """Return the names of the modules that a part consists of, in order."""
        names = getattr(self, part)
        return (names,) if isinstance(names, str) else names

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of the linears."""
        return *self.of("qkv"), self.attention_out, *self.of("inner"), self.outer


@dataclass(frozen=True)
class EmbeddingSum:
    """`BackboneAdapter.embed` of a family whose module ``embeddings`` returns a norm of a sum of embeddings.

    That is ``norm(words id + types type + positions position)``, which the extension computes in one call on the
    CPU, beside layers on the vector kernels.

    Attributes:
        words, positions, types: dotted names of the embeddings; None for positions or types that are not added, which
            the module then does not take as `position_ids` or `token_type_ids` either.
        norm: dotted name of the layer norm.
    """

    words: str = "word_embeddings"
    positions: str | None = "position_embeddings"
    types: str | None = "token_type_embeddings"
    norm: str = "LayerNorm"

    def __call__(self, backbone: nn.Module, ids: Tensor, positions: Tensor, types: Tensor) -> Tensor:
        """Return the embeddings by the family's module."""
        given = {"input_ids": ids}
        if self.positions is not None:
            given["position_ids"] = positions
        if self.types is not None:
            given["token_type_ids"] = types
        return backbone.embeddings(**given)  # type: ignore[operator]


def single(layer: nn.Module) -> Sequence[nn.Module]:
    """Return a layer that is one encoder layer as a sequence of length 1."""
    return (layer,)


def in_layers(backbone: nn.Module) -> None:
    """Return None: every layer ends in a norm of its own."""


def none_beside(backbone: nn.Module) -> Sequence[nn.Module]:
    """Return no modules: layers need nothing besides hidden states."""
    return ()


def as_wide(backbone: nn.Module) -> None:
    """Return None: the embeddings are as wide as the layers."""


@dataclass(frozen=True)
class BackboneAdapter:
    """The parts of one family of encoders.

    Attributes:
        model_type: of the family's config.
        base: name of the encoder in the stock classifier.
        head: the stock classification head.
        embed: ``(backbone, ids [1, T], positions [1, T], types [1, T]) -> [1, T, E]``, the embeddings of packed tokens;
            an `EmbeddingSum` if they are a norm of a sum.
        layers: ``backbone ->`` the L layers in order of use, each called as ``layer(hidden, plan=...)``; the
            layer must pass `plan` on to the attention function.
        positions: ``(backbone, input_ids [N, S]) -> [N, S]``, positions as the stock model computes them from padded
            ids.
        longest: ``config ->`` maximum number of tokens in a row.
        names: of the parts of an encoder layer, for the fused layers; None for layers of another form, which are not
            fused.
        parts: ``layer ->`` the encoder layers that it runs in sequence; usually the layer itself.
        shares_layers: whether one layer is used several times.
        widen: ``backbone ->`` the linear from the width E of the embeddings to the width H of the layers, or None where
            they are equal.
        embeddings: dotted name of the module that `embed` calls.
        exit_norm: ``backbone ->`` the norm after the last layer, through which every exit reads the hidden states
            (pre-norm encoders), or None where the layers end in norms of their own.
        layer_arguments: ``(backbone, hidden [1, T, H], positions [1, T]) ->`` further keyword arguments of each layer,
            such as rotary embeddings of the positions; None for none.
        rectangle_arguments: for layers that compute attention themselves: ``(backbone, states [rows, width, H], keep
            [rows, width] bool) ->`` their keyword arguments for padded rows. Each layer is then called as
            ``layer(states, **arguments)`` on rows of similar length. Rows with holes are refused, since such layers
            read the distance of two tokens. None for layers that call the attention function.
        beside_layers: ``backbone ->`` modules with weights that these two functions read.
        window: ``config ->`` what attention modules made for a config have as `sliding_window` where their layer has a
            window; None where they hold none.
    """

    model_type: str
    base: str
    head: StockHead
    embed: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
    layers: Callable[[nn.Module], Sequence[Callable[..., Any]]]
    positions: Callable[[nn.Module, Tensor], Tensor]
    longest: Callable[[Any], int]
    names: LayerNames | GatedLayerNames | None = LayerNames()
    parts: Callable[[nn.Module], Sequence[nn.Module]] = single
    shares_layers: bool = False
    widen: Callable[[nn.Module], nn.Linear | None] = as_wide
    embeddings: str = "embeddings"
    exit_norm: Callable[[nn.Module], nn.Module | None] = in_layers
    layer_arguments: Callable[[nn.Module, Tensor, Tensor], Sequence[Mapping[str, Any]]] | None = None
    rectangle_arguments: Callable[[nn.Module, Tensor, Tensor], Mapping[str, Any]] | None = None
    beside_layers: Callable[[nn.Module], Sequence[nn.Module]] = none_beside
    window: Callable[[Any], int | None] | None = None

    def first_states(self, backbone: nn.Module, ids: Tensor, positions: Tensor, types: Tensor) -> Tensor:
        """Return the input of layer 1, ``[1, T, H]``, for ids, positions and types ``[1, T]``."""
        embedded, widen = self.embed(backbone, ids, positions, types), self.widen(backbone)
        return embedded if widen is None else widen(embedded)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


#: Kind of each field of an adapter, in words, and a test of it.
FIELD_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("model_type", "base", "embeddings"), ("a non-empty string", _is_name)),
    **dict.fromkeys(
        ("embed", "layers", "positions", "longest", "parts", "widen", "exit_norm", "beside_layers"),
        ("a function", callable),
    ),
    **dict.fromkeys(
        ("layer_arguments", "rectangle_arguments", "window"),
        ("a function or None", lambda v: v is None or callable(v)),
    ),
    "head": ("a StockHead", lambda v: isinstance(v, StockHead)),
    "names": (
        "a LayerNames, a GatedLayerNames or None",
        lambda v: v is None or isinstance(v, (LayerNames, GatedLayerNames)),
    ),
    "shares_layers": ("True or False", lambda v: isinstance(v, bool)),
}


def check_adapter(adapter: Any) -> None:
    """Check the fields of an adapter.

    Raises:
        TypeError: not an adapter.
        ValueError: names the first field with the wrong kind of value.
    """
    if not isinstance(adapter, BackboneAdapter):
        raise TypeError(f"register: expected a BackboneAdapter, got {adapter!r}")
    for field in fields(adapter):
        expected, fits = FIELD_KINDS[field.name]
        value = getattr(adapter, field.name)
        if not fits(value):
            raise ValueError(f"register: expected {field.name} of the adapter to be {expected}, got {value!r}")


def check_parts(adapter: BackboneAdapter, backbone: nn.Module) -> None:
    """Check that an adapter names every part of a backbone that has weights; other parts would never run.

    Raises:
        ValueError: names the modules that the adapter does not use.
    """
    try:
        parts: list[Any] = [backbone.get_submodule(adapter.embeddings), *adapter.layers(backbone)]
        parts += [adapter.widen(backbone), adapter.exit_norm(backbone), *adapter.beside_layers(backbone)]
    except AttributeError as error:
        raise ValueError(
            f"the adapter of {adapter.model_type!r} does not fit {type(backbone).__name__}: {error}"
        ) from error
    named = {id(p) for part in parts if part is not None for p in part.parameters()}
    left = [name for name, p in backbone.named_parameters() if id(p) not in named]
    if left:
        modules = sorted({name.rpartition(".")[0] or name for name in left})
        raise ValueError(
            f"the adapter of {adapter.model_type!r} does not use {', '.join(modules)} of {type(backbone).__name__}, so "
            "its exits would answer without them; expected embeddings, an optional linear that widens them, layers, "
            "and the norm before the exits (exit_norm) of a pre-norm encoder"
        )


def column_positions(backbone: nn.Module, input_ids: Tensor) -> Tensor:
    """Return the column of each token as its position, ``[N, S]``."""
    return torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)


def position_limit(config: Any) -> int:
    """Return the maximum number of tokens in a row, for positions that start at 0."""
    return config.max_position_embeddings


def encoder_layers(backbone: nn.Module) -> Sequence[nn.Module]:
    """Return the layers of a backbone that has them in ``encoder.layer``."""
    return backbone.encoder.layer  # type: ignore[union-attr, return-value]


def embed_with_types(backbone: nn.Module, ids: Tensor, positions: Tensor, types: Tensor) -> Tensor:
    """Return the embeddings of a backbone whose embedding module takes token types."""
    return backbone.embeddings(input_ids=ids, position_ids=positions, token_type_ids=types)  # type: ignore[operator]


def embed_tokens(backbone: nn.Module, ids: Tensor, positions: Tensor, types: Tensor) -> Tensor:
    """Return the embeddings of a backbone that has only those of tokens, in ``embed_tokens``."""
    return backbone.embed_tokens(ids)  # type: ignore[operator]


def layers_of(backbone: nn.Module) -> Sequence[nn.Module]:
    """Return the layers of a backbone that has them in ``layers``."""
    return backbone.layers  # type: ignore[return-value]


def norm_of(backbone: nn.Module) -> nn.Module:
    """Return the norm of a backbone that has it in ``norm``."""
    return backbone.norm  # type: ignore[return-value]


def rotary(backbone: nn.Module, hidden: Tensor, positions: Tensor) -> Sequence[Mapping[str, Any]]:
    """Return the rotary embeddings of the positions, the same for each layer."""
    module: Any = backbone
    embeddings = module.rotary_emb(hidden, positions)
    return [{"position_embeddings": embeddings}] * len(module.layers)


def rotary_by_type(backbone: nn.Module, hidden: Tensor, positions: Tensor) -> Sequence[Mapping[str, Any]]:
    """Return the rotary embeddings of the positions, which differ between the types of layers.

    The types are those that the layers were made with, or of the config for layers that do not tell theirs.
    """
    module: Any = backbone
    known = zip(module.layers, module.config.layer_types, strict=True)
    types = [vars(layer).get("attention_type", kind) for layer, kind in known]
    embeddings = {kind: module.rotary_emb(hidden, positions, kind) for kind in dict.fromkeys(types)}
    return [{"position_embeddings": embeddings[kind]} for kind in types]


def query_width(config: Any) -> int:
    """Return the width of the queries of a layer, all heads together."""
    head = getattr(config, "head_dim", None)
    return config.num_attention_heads * head if head else config.hidden_size


def linear_weights(*modules: Any) -> int:
    """Return the number of weights in the linears of some modules, which is their multiply-adds per token."""
    return sum(m.weight.numel() for module in modules for m in module.modules() if isinstance(m, nn.Linear))
