"""Layers of BERT's form in the resident loop: a norm after attention and after feed-forward, absolute positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from torch import Tensor

from earlyexit_kernels.backbones import LayerNames
from earlyexit_kernels.engine.bert_weights import OP_ACTIVATIONS, LayerWeights, Pair
from earlyexit_kernels.engine.resident_buffers import Activations, Arena, Bucket, RowBuffers, of_width
from earlyexit_kernels.engine.view import ModelView
from earlyexit_kernels.ops import rows_add_norm, rows_attention, rows_linear


@dataclass(frozen=True)
class PostNormLayers:
    """The layers; see `resident.ResidentLayers`.

    Attributes:
        weights: of each layer; a layer of ALBERT may have several parts.
        rows, x: buffers of the loop.
        length: S of the bucket.
        backend: of the ops.
    """

    weights: list[list[LayerWeights]]
    rows: RowBuffers
    x: Activations
    length: int
    backend: str

    @staticmethod
    def unsupported_reason(view: ModelView) -> str | None:
        """Return why the kernels cannot run layers that `fused_layers.layers_unsupported_reason` accepts, or None."""
        if view.exit_norm is not None:
            return "the exits read the tokens through the norm at the end of the encoder"
        return None

    @staticmethod
    def of(
        view: ModelView, bucket: Bucket, rows: RowBuffers, backend: str, arena: Arena | None = None
    ) -> PostNormLayers:
        """Return the layers of a model, and buffers for a bucket."""
        names, config = cast(LayerNames, view.adapter.names), view.backbone.config
        weights = [
            [LayerWeights.of(part, names, config) for part in view.adapter.parts(layer)] for layer in view.layers
        ]
        inner = max(own.inner.weight.shape[0] for each in weights for own in each)
        x = Activations.new(bucket, view, inner=inner, arena=arena)
        return PostNormLayers(weights, rows, x, bucket.length, backend)

    def begin(self, embedded: Tensor) -> Callable[[int], None]:
        """Return a function that runs a 1-based layer on the live side."""
        return self._run

    def _run(self, layer: int) -> None:
        for own in self.weights[layer - 1]:
            self._encode(own)

    def _encode(self, own: LayerWeights) -> None:
        """Run one encoder layer."""
        x, rows, backend = self.x, self.rows, self.backend
        offsets, inner = rows.offsets, of_width(x.inner, own.inner.weight.shape[0])
        weights, biases = zip(*own.projections, strict=True)
        rows_linear(x.hidden, weights, biases, offsets, x.qkv, absolute=True, backend=backend)
        rows_attention(x.qkv, offsets, rows.row_ids, own.heads, self.length, x.context, backend=backend)
        first, second = own.eps
        self._add_norm(x.context, own.attention_out, x.hidden, own.attention_norm, first, x.context)
        activation = OP_ACTIVATIONS[own.activation]
        rows_linear(x.context, *own.inner, offsets, inner, activation=activation, backend=backend)
        self._add_norm(inner, own.outer, x.context, own.norm, second, x.hidden)

    def _add_norm(self, x: Tensor, linear: Pair, residual: Tensor, norm: Pair, eps: float, out: Tensor) -> None:
        """Write the norm of a residual and a linear of `x`; `hidden` starts at its live side."""
        offsets, middle, hidden = self.rows.offsets, self.x.middle, self.x.hidden
        rows_linear(x, *linear, offsets, middle, in_parts=True, backend=self.backend)
        rows_add_norm(
            middle, residual, *norm, eps, offsets, out, x_bias=linear.bias if middle.dim() == 3 else None,
            residual_absolute=residual is hidden, out_absolute=out is hidden, backend=self.backend,
        )  # fmt: skip
