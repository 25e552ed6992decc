"""ModernBERT's layers in the resident loop: norms before attention and feed-forward, rotary positions, windows.

The hidden states are the residual stream. Each layer also leaves them behind the norm at the end of the encoder, where
the exits read them. Angles and columns of the tokens stay in their first order: kernels find them by row id.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from earlyexit_kernels.engine.modernbert_weights import (
    Affine,
    ModernBertWeights,
    affine_unsupported_reason,
    modernbert_unsupported_reason,
)
from earlyexit_kernels.engine.resident_buffers import Activations, Bucket, RowBuffers
from earlyexit_kernels.engine.resident_postnorm import OP_ACTIVATIONS
from earlyexit_kernels.engine.view import ModelView
from earlyexit_kernels.ops import rows_add_norm, rows_attention, rows_glu, rows_linear, rows_rotary


class Angles(NamedTuple):
    """Cosines and sines ``[T, D]`` of the positions of the packed tokens, before any row has left."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class ModernBertLayers:
    """The layers; see `resident.ResidentLayers`.

    Attributes:
        weights: of each layer.
        exit_norm, exit_eps: the norm at the end of the encoder.
        zeros: stands for a bias that a linear or a norm does not have.
        rows, x: buffers of the loop.
        length: S of the bucket.
        backend: of the ops.
        arguments: ``(hidden [1, T, H], positions [1, T]) ->`` for each layer, keyword arguments with the cosines and
            sines of the positions, from the family's own module.
    """

    weights: list[ModernBertWeights]
    exit_norm: Affine
    exit_eps: float
    zeros: Tensor
    rows: RowBuffers
    x: Activations
    length: int
    backend: str
    arguments: Callable[[Tensor, Tensor], Sequence[Mapping[str, Any]]]

    @staticmethod
    def unsupported_reason(view: ModelView) -> str | None:
        """Return why the layers of a model cannot be computed so, or None."""
        norm = view.exit_norm
        if type(norm) is not nn.LayerNorm or affine_unsupported_reason(norm):
            return f"the norm at the end of the encoder ({type(norm).__name__}) is not a plain LayerNorm"
        if view.adapter.layer_arguments is None:
            return f"the adapter of {view.adapter.model_type!r} gives the layers no rotary positions"
        return next((reason for reason in map(modernbert_unsupported_reason, view.layers) if reason), None)

    @staticmethod
    def of(view: ModelView, bucket: Bucket, rows: RowBuffers, backend: str) -> ModernBertLayers:
        """Return the layers of a model, and buffers for a bucket."""
        weights, norm = [ModernBertWeights.of(layer) for layer in view.layers], cast(nn.LayerNorm, view.exit_norm)
        sizes = [each.weight.shape[0] for own in weights for each in (own.projections, own.inner)]
        return ModernBertLayers(
            weights=weights,
            exit_norm=Affine.of(norm),
            exit_eps=norm.eps,
            zeros=weights[0].norm.weight.new_zeros(max(sizes)),
            rows=rows,
            x=Activations.new(bucket, view, inner=weights[0].outer.weight.shape[1], pre_norm=True),
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
        given = [each["position_embeddings"] for each in self.arguments(embedded[None], self.rows.tokens[1][None])]
        # layers of a type have the same tensors
        angles = {id(pair): Angles(*(x[0].contiguous() for x in pair)) for pair in given}
        return partial(self._run, [angles[id(pair)] for pair in given])

    def _run(self, angles: Sequence[Angles], layer: int) -> None:
        own, x, rows, turns = self.weights[layer - 1], self.x, self.rows, angles[layer - 1]
        offsets, row_ids, backend = rows.offsets, rows.row_ids, self.backend
        if own.attention_norm is None:
            self._linear(x.hidden, own.projections, x.qkv, absolute=True)
        else:
            self._norm(None, own.attention_norm, own.eps[0], x.context)
            self._linear(x.context, own.projections, x.qkv)
        rows_rotary(x.qkv, turns.cos, turns.sin, rows.starts, offsets, row_ids, own.heads, self.length, backend=backend)
        columns, starts = (None, None) if own.window is None else (rows.tokens[3], rows.starts)
        rows_attention(
            x.qkv, offsets, row_ids, own.heads, self.length, x.context,
            window=own.window, columns=columns, starts=starts, backend=backend,
        )  # fmt: skip
        self._linear(x.context, own.attention_out, x.middle)
        self._norm(x.middle, own.norm, own.eps[1], x.context)
        self._linear(x.context, own.inner, x.wide)
        rows_glu(x.wide, offsets, x.inner, activation=OP_ACTIVATIONS[own.activation], backend=backend)
        self._linear(x.inner, own.outer, x.middle)
        self._norm(x.middle, self.exit_norm, self.exit_eps, x.read, out_absolute=True)

    def _linear(self, x: Tensor, own: Affine, out: Tensor, *, absolute: bool = False) -> None:
        rows_linear(x, own.weight, self._bias(own), self.rows.offsets, out, absolute=absolute, backend=self.backend)

    def _norm(self, x: Tensor | None, own: Affine, eps: float, out: Tensor, *, out_absolute: bool = False) -> None:
        """Add `x` to the residual stream, if given, and write its norm to `out`."""
        stream = self.x.hidden
        rows_add_norm(
            x, stream, own.weight, self._bias(own), eps, self.rows.offsets, out, residual_absolute=True,
            out_absolute=out_absolute, total=None if x is None else stream, backend=self.backend,
        )  # fmt: skip

    def _bias(self, own: Affine) -> Tensor:
        return self.zeros[: own.weight.shape[0]] if own.bias is None else own.bias
