"""The static buffers of the resident loop."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
        tokens: ``[3, T]`` int64: ids, positions and types of the packed tokens.
        found: ``[2, R]`` int32, scratch of `ops.pack_tokens`.
        row_ids, source: ``[R]`` int32, as in `ops.resident_exit`.
        offsets, old_offsets: ``[R + 1]`` int32, as in `ops.resident_exit`.
    """

    tokens: Tensor
    found: Tensor
    row_ids: Tensor
    source: Tensor
    offsets: Tensor
    old_offsets: Tensor

    @staticmethod
    def new(bucket: Bucket, device: torch.device) -> RowBuffers:
        """Return buffers of zeros."""
        rows = bucket.rows
        tokens = torch.zeros(3, bucket.tokens, dtype=torch.int64, device=device)
        shapes = ((2, rows), (rows,), (rows,), (rows + 1,), (rows + 1,))
        return RowBuffers(tokens, *(torch.zeros(shape, dtype=torch.int32, device=device) for shape in shapes))


@dataclass(frozen=True)
class Activations:
    """Values of the tokens within a layer, for width H and inner width I.

    Attributes:
        hidden: ``[2 T, H]``, two sides.
        qkv, context, inner: ``[T, 3 H]``, ``[T, H]`` and ``[T, I]``.
        middle: a product before its norm, ``[T, H]``; of few tokens the sums of its parts, ``[SUM_PARTS, T, H]``
            float32, by which the norm has the same bits.
        features: ``[R, F]`` of exits with a dense module.
    """

    hidden: Tensor
    qkv: Tensor
    context: Tensor
    middle: Tensor
    inner: Tensor
    features: Tensor

    @staticmethod
    def new(
        bucket: Bucket, *, width: int, inner: int, features: int, dtype: torch.dtype, device: torch.device
    ) -> Activations:
        """Return buffers of zeros for H, the largest I, and F."""
        tokens = bucket.tokens
        split = few_tiles(dtype, tokens, width)
        shapes = {
            "hidden": (2 * tokens, width),
            "qkv": (tokens, 3 * width),
            "context": (tokens, width),
            "middle": (SUM_PARTS, tokens, width) if split else (tokens, width),
            "inner": (tokens, inner),
            "features": (bucket.rows, features),
        }
        dtypes = {"middle": torch.float32} if split else {}
        made = {n: torch.zeros(s, dtype=dtypes.get(n, dtype), device=device) for n, s in shapes.items()}
        return Activations(**made)
