"""The static buffers of the resident loop."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from earlyexit_kernels.engine.view import ModelView
from earlyexit_kernels.ops.tiles import SUM_PARTS, few_tiles


@dataclass(frozen=True, order=True)
class Bucket:
    """Maximum size of a batch in the buffers of a loop: R rows of S tokens."""

    rows: int
    length: int

    @property
    def tokens(self) -> int:
        """T."""
        return self.rows * self.length


@dataclass(frozen=True)
class BatchBuffers:
    """A loaded batch, the inputs of `ops.pack_tokens`.

    Attributes:
        size: ``[5]`` int32: rows, padded length, and whether there are a mask, positions and types.
        ids, mask, positions, types: ``[R, S]`` int64.
    """

    size: Tensor
    ids: Tensor
    mask: Tensor
    positions: Tensor
    types: Tensor

    @staticmethod
    def new(bucket: Bucket, device: torch.device) -> BatchBuffers:
        """Return buffers of zeros."""
        shape = (bucket.rows, bucket.length)
        inputs = [torch.zeros(shape, dtype=torch.int64, device=device) for _ in range(4)]
        return BatchBuffers(torch.zeros(5, dtype=torch.int32, device=device), *inputs)


@dataclass(frozen=True)
class RowBuffers:
    """The packed rows, and the plan of a compaction.

    Attributes:
        tokens: ``[4, T]`` int64: ids, positions, types and columns of the packed tokens, before any row has left.
        found: ``[2, R]`` int32, scratch of `ops.pack_tokens`.
        row_ids, source: ``[R]`` int32, as in `ops.resident_exit`.
        offsets, old_offsets: ``[R + 1]`` int32, as in `ops.resident_exit`.
        starts: ``[R + 1]`` int32, the offsets before any row has left: the first of the `tokens` of each request row.
    """

    tokens: Tensor
    found: Tensor
    row_ids: Tensor
    source: Tensor
    offsets: Tensor
    old_offsets: Tensor
    starts: Tensor

    @staticmethod
    def new(bucket: Bucket, device: torch.device) -> RowBuffers:
        """Return buffers of zeros."""
        rows = bucket.rows
        tokens = torch.zeros(4, bucket.tokens, dtype=torch.int64, device=device)
        shapes = ((2, rows), (rows,), (rows,), (rows + 1,), (rows + 1,), (rows + 1,))
        return RowBuffers(tokens, *(torch.zeros(shape, dtype=torch.int32, device=device) for shape in shapes))


@dataclass(frozen=True)
class Activations:
    """Values of the tokens within a layer, for width H and inner width I.

    Attributes:
        hidden: ``[2 T, H]``, two sides.
        read: ``[2 T, H]``, what the exits read: `hidden`, or in pre-norm encoders these behind the norm at their end.
        qkv, context, inner: ``[T, 3 H]``, ``[T, H]`` and ``[T, I]``.
        middle: a product before its norm, ``[T, H]``; of few tokens the sums of its parts, ``[SUM_PARTS, T, H]``
            float32, by which the norm has the same bits.
        wide: ``[T, 2 I]`` of gated feed-forward layers, else ``[T, 0]``.
        features: ``[R, F]`` of exits with a dense module.
    """

    hidden: Tensor
    read: Tensor
    qkv: Tensor
    context: Tensor
    middle: Tensor
    inner: Tensor
    wide: Tensor
    features: Tensor

    @staticmethod
    def new(bucket: Bucket, view: ModelView, *, inner: int, pre_norm: bool = False) -> Activations:
        """Return buffers of zeros.

        Args:
            bucket: the largest batch.
            view: of the model, for its widths, dtype and device.
            inner: the largest I.
            pre_norm: whether `read` and `wide` are used.
        """
        tokens, width = bucket.tokens, view.backbone.config.hidden_size
        like = next(view.backbone.parameters())

        def buffer(rows: int, columns: int) -> Tensor:
            return torch.zeros(rows, columns, dtype=like.dtype, device=like.device)

        hidden, middle = buffer(2 * tokens, width), buffer(tokens, width)
        if few_tiles(like.dtype, tokens, width):
            middle = torch.zeros(SUM_PARTS, tokens, width, dtype=torch.float32, device=like.device)
        return Activations(
            hidden=hidden,
            read=buffer(2 * tokens, width) if pre_norm else hidden,
            qkv=buffer(tokens, 3 * width),
            context=buffer(tokens, width),
            middle=middle,
            inner=buffer(tokens, inner),
            wide=buffer(tokens, 2 * inner * pre_norm),
            features=buffer(bucket.rows, view.heads.features_size),
        )


def of_width(buffer: Tensor, width: int) -> Tensor:
    """Return ``[T, width]`` in the memory of a buffer ``[T, W]``, for layers narrower than the widest."""
    return buffer.view(-1)[: buffer.shape[0] * width].view(-1, width)
