"""Layers of ModernBERT's form in the resident loop: norms first, rotary positions, windows, a gated feed-forward.

The hidden states are the residual stream. Each layer also leaves them behind the norm at the end of the encoder, where
the exits read them. Angles and columns of the tokens stay in their first order: kernels find them by row id.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

from torch import Tensor

from earlyexit_kernels.backbones import GatedLayerNames
from earlyexit_kernels.engine.bert_weights import ACTIVATIONS, OP_ACTIVATIONS
from earlyexit_kernels.engine.gated_weights import Affine, GatedWeights, Norm, unlike_norm
from earlyexit_kernels.engine.resident_buffers import Activations, Arena, Bucket, RowBuffers, of_width
from earlyexit_kernels.engine.view import ModelView
from earlyexit_kernels.ops import rows_add_norm, rows_attention, rows_glu, rows_linear, rows_rotary


class Angles(NamedTuple):
    """Cosines and sines ``[T, D]`` of the positions of the packed tokens, before any row has left."""

    cos: Tensor
    sin: Tensor

    @staticmethod
    def of(*, position_embeddings: tuple[Tensor, Tensor]) -> Angles:
        """Return those of the keyword arguments of a layer; any other argument is an error."""
        cos, sin = position_embeddings
        return Angles(cos[0].contiguous(), sin[0].contiguous())


@dataclass(frozen=True)
class PreNormLayers:
    """The layers; see `resident.ResidentLayers`.

    Attributes:
        weights: of each layer, which may have several parts.
        exit_norm: the norm at the end of the encoder.
        zeros: stands for a bias that a linear or a norm does not have.
        rows, x: buffers of the loop.
        length: S of the bucket.
        backend: of the ops.
        arguments: ``(hidden [1, T, H], positions [1, T]) ->`` for each layer, keyword arguments with the cosines and
            sines of the positions, from the family's own module.
    """

    weights: list[list[GatedWeights]]
    exit_norm: Norm
    zeros: Tensor
    rows: RowBuffers
    x: Activations
    length: int
    backend: str
    arguments: Callable[[Tensor, Tensor], Sequence[Mapping[str, Any]]]

    @staticmethod
    def unsupported_reason(view: ModelView) -> str | None:
        """Return why the kernels cannot run layers that `fused_layers.layers_unsupported_reason` accepts, or None."""
        norm, width = view.exit_norm, view.backbone.config.hidden_size
        names = cast(GatedLayerNames, view.adapter.names)
        if len(names.of("qkv")) + len(names.of("inner")) > 2:
            return "its kernels require query, key and value in one linear, and both halves of the feed-forward in one"
        if norm is None or unlike_norm(norm) or not _is_affine(Norm.of(norm)):
            return f"the norm at the end of the encoder ({type(norm).__name__}) is not a plain LayerNorm with a weight"
        reasons = (_unsupported_reason(own, width) for each in _weights(view) for own in each)
        return next((reason for reason in reasons if reason), None)

    @staticmethod
    def of(
        view: ModelView, bucket: Bucket, rows: RowBuffers, backend: str, arena: Arena | None = None
    ) -> PreNormLayers:
        """Return the layers of a model, and buffers for a bucket."""
        weights = _weights(view)
        parts = [own for each in weights for own in each]
        inner = max(own.outer.weight.shape[1] for own in parts)
        outputs = max(each.weight.shape[0] for own in parts for each in (own.qkv, own.inner))
        return PreNormLayers(
            weights=weights,
            exit_norm=cast(Norm, Norm.of(view.exit_norm)),
            zeros=parts[0].qkv.weight.new_zeros(outputs),
            rows=rows,
            x=Activations.new(bucket, view, inner=inner, pre_norm=True, arena=arena),
            length=bucket.length,
            backend=backend,
            arguments=partial(cast(Callable, view.adapter.layer_arguments), view.backbone),
        )

    def begin(self, embedded: Tensor) -> Callable[[int], None]:
        """Note the packed rows before any has left, and return a function that runs a 1-based layer on the live side.

        Args:
            embedded: ``[T, H]``.
        """
        self.rows.starts.copy_(self.rows.offsets)
        given = self.arguments(embedded[None], self.rows.tokens[1][None])
        return partial(self._run, [Angles.of(**each) for each in given])

    def _run(self, angles: Sequence[Angles], layer: int) -> None:
        for own in self.weights[layer - 1]:
            self._encode(own, angles[layer - 1])

    def _encode(self, own: GatedWeights, turns: Angles) -> None:
        """Run one encoder layer."""
        x, rows, backend, heads = self.x, self.rows, self.backend, own.qkv.weight.shape[0] // (3 * own.head_width)
        offsets, row_ids, size = rows.offsets, rows.row_ids, own.outer.weight.shape[1]
        wide, inner = of_width(x.wide, 2 * size), of_width(x.inner, size)
        if own.attention_norm is None:
            self._linear(x.hidden, own.qkv, x.qkv, absolute=True)
        else:
            self._norm(None, None, cast(Norm, own.attention_norm), x.context)
            self._linear(x.context, own.qkv, x.qkv)
        rows_rotary(x.qkv, *turns, rows.starts, offsets, row_ids, heads, self.length, backend=backend)
        columns, starts = (None, None) if own.window is None else (rows.tokens[3], rows.starts)
        rows_attention(
            x.qkv, offsets, row_ids, heads, self.length, x.context,
            window=own.window, columns=columns, starts=starts, backend=backend,
        )  # fmt: skip
        self._add_norm(x.context, own.attention_out, cast(Norm, own.norm), x.context)
        self._linear(x.context, own.inner, wide)
        activation = OP_ACTIVATIONS[ACTIVATIONS[type(own.activation).__name__]]
        rows_glu(wide, offsets, inner, activation=activation, backend=backend)
        self._add_norm(inner, own.outer, self.exit_norm, x.read, out_absolute=True)

    def _linear(self, x: Tensor, own: Affine, out: Tensor, *, absolute: bool = False, in_parts: bool = False) -> None:
        rows_linear(
            x, own.weight, self._bias(own.bias, own.weight), self.rows.offsets, out,
            absolute=absolute, in_parts=in_parts, backend=self.backend,
        )  # fmt: skip

    def _add_norm(self, x: Tensor, own: Affine, norm: Norm, out: Tensor, *, out_absolute: bool = False) -> None:
        """Add a linear of `x` to the residual stream, and write the norm of the stream to `out`."""
        middle = self.x.middle
        self._linear(x, own, middle, in_parts=True)
        bias = self._bias(own.bias, own.weight) if middle.dim() == 3 else None
        self._norm(middle, bias, norm, out, out_absolute=out_absolute)

    def _norm(
        self, x: Tensor | None, x_bias: Tensor | None, own: Norm, out: Tensor, *, out_absolute: bool = False
    ) -> None:
        """Add `x` to the residual stream, if given, and write its norm to `out`."""
        stream, weight = self.x.hidden, cast(Tensor, own.weight)
        rows_add_norm(
            x, stream, weight, self._bias(own.bias, weight), own.eps, self.rows.offsets, out, x_bias=x_bias,
            residual_absolute=True, out_absolute=out_absolute, total=None if x is None else stream,
            backend=self.backend,
        )  # fmt: skip

    def _bias(self, bias: Tensor | None, weight: Tensor) -> Tensor:
        return self.zeros[: weight.shape[0]] if bias is None else bias


def _weights(view: ModelView) -> list[list[GatedWeights]]:
    """Return the weights of the parts of each layer."""
    names = cast(GatedLayerNames, view.adapter.names)
    return [[GatedWeights.of(part, names) for part in view.adapter.parts(layer)] for layer in view.layers]


def _is_affine(norm: Any) -> bool:
    return isinstance(norm, Norm) and norm.weight is not None


def _unsupported_reason(own: GatedWeights, width: int) -> str | None:
    """Return why the kernels cannot run a layer of a model of a width, or None if they can."""
    if not (own.attention_norm is None or _is_affine(own.attention_norm)) or not _is_affine(own.norm):
        return "its kernels require a weight in each norm of a layer, and a norm before the feed-forward"
    if type(own.activation).__name__ not in ACTIVATIONS:
        return f"its kernels support the activations {sorted(ACTIVATIONS)}, not {type(own.activation).__name__}"
    if own.head_width % 2:
        return f"its kernels rotate heads of an even width, got head_dim {own.head_width}"
    if own.qkv.weight.shape != (3 * width, width):
        found = list(own.qkv.weight.shape)
        return f"its kernels require query, key and value of {[3 * width, width]} together, got {found}"
    return None
