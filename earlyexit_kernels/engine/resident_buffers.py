"""The static buffers of the resident loop."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
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


#: Shape and dtype of a buffer.
Shape = tuple[tuple[int, ...], torch.dtype]
#: Bytes that buffers in shared memory start at a multiple of, as those of torch do.
ALIGNMENT = 512


@dataclass(frozen=True, eq=False)
class Memory:
    """Memory of the activations of loops; those that hold it keep it.

    Attributes:
        data: ``[bytes]`` uint8.
    """

    data: Tensor


class Arena:
    """Memory that the activations of all loops share which never run at the same time.

    A loop that needs more than there is gets new memory, which later loops share; earlier ones keep theirs, until the
    last of them is dropped. Sizes of buckets are powers of two, so all of it is about twice what the largest needs.
    """

    def __init__(self) -> None:
        self._newest: weakref.ref[Memory] | None = None

    def take(self, size: int, device: torch.device) -> Memory:
        """Return at least so many bytes, which may hold anything."""
        newest = None if self._newest is None else self._newest()
        if newest is None or newest.data.device != device or newest.data.shape[0] < size:
            newest = Memory(torch.zeros(size, dtype=torch.uint8, device=device))
            self._newest = weakref.ref(newest)
        return newest


@dataclass(frozen=True)
class Activations:
    """Values of the tokens within a layer, for width H and inner width I.

    Attributes:
        memory: in which they lie.
        hidden: ``[2 T, H]``, two sides.
        read: ``[2 T, H]``, what the exits read: `hidden`, or in pre-norm encoders these behind the norm at their end.
        qkv, context, inner: ``[T, 3 H]``, ``[T, H]`` and ``[T, I]``.
        middle: a product before its norm, ``[T, H]``; of few tokens the sums of its parts, ``[SUM_PARTS, T, H]``
            float32, by which the norm has the same bits.
        wide: ``[T, 2 I]`` of gated feed-forward layers, else ``[T, 0]``.
        features: ``[R, F]`` of exits with a dense module.
    """

    memory: Memory
    hidden: Tensor
    read: Tensor
    qkv: Tensor
    context: Tensor
    middle: Tensor
    inner: Tensor
    wide: Tensor
    features: Tensor

    @staticmethod
    def new(
        bucket: Bucket, view: ModelView, *, inner: int, pre_norm: bool = False, arena: Arena | None = None
    ) -> Activations:
        """Return buffers, which may hold anything.

        Args:
            bucket: the largest batch.
            view: of the model, for its widths, dtype and device.
            inner: the largest I.
            pre_norm: whether `read` and `wide` are used.
            arena: of the memory, or None for memory of its own.
        """
        like = next(view.backbone.parameters())
        width, features = view.backbone.config.hidden_size, view.heads.features_size
        shapes = activation_shapes(bucket.tokens, width, inner, like.dtype, pre_norm=pre_norm)
        memory = (arena or Arena()).take(bytes_of(shapes.values()), like.device)
        found, start = {"features": torch.zeros(bucket.rows, features, dtype=like.dtype, device=like.device)}, 0
        for name, (shape, dtype) in shapes.items():
            size = math.prod(shape) * dtype.itemsize
            found[name] = memory.data[start : start + size].view(dtype).view(shape)
            start += aligned(size)
        return Activations(memory=memory, read=found.pop("read", found["hidden"]), **found)

    @property
    def buffers(self) -> list[Tensor]:
        """All buffers."""
        return [self.hidden, self.read, self.qkv, self.context, self.middle, self.inner, self.wide, self.features]


def activation_shapes(
    tokens: int, width: int, inner: int, dtype: torch.dtype, *, pre_norm: bool = False
) -> dict[str, Shape]:
    """Return the shape and dtype of each buffer of `Activations` that lies in its memory.

    Args:
        tokens: T; nothing else of a bucket counts, so that all buckets of so many tokens share memory.
        width, inner: H and the largest I.
        dtype: of the model.
        pre_norm: as for `Activations.new`.
    """
    middle: Shape = (tokens, width), dtype
    if few_tiles(dtype, tokens, width):
        middle = (SUM_PARTS, tokens, width), torch.float32
    sizes = {"hidden": (2 * tokens, width)} | ({"read": (2 * tokens, width)} if pre_norm else {})
    sizes |= {"qkv": (tokens, 3 * width), "context": (tokens, width), "inner": (tokens, inner)}
    sizes["wide"] = tokens, 2 * inner * pre_norm
    return {"middle": middle, **{name: (shape, dtype) for name, shape in sizes.items()}}


def aligned(size: int) -> int:
    """Return a number of bytes rounded up, so that a buffer after it is aligned."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def bytes_of(shapes: Iterable[Shape]) -> int:
    """Return the bytes of buffers that lie one after another."""
    return sum(aligned(math.prod(shape) * dtype.itemsize) for shape, dtype in shapes)


def of_width(buffer: Tensor, width: int) -> Tensor:
    """Return ``[T, width]`` in the memory of a buffer ``[T, W]``, for layers narrower than the widest."""
    return buffer.view(-1)[: buffer.shape[0] * width].view(-1, width)
