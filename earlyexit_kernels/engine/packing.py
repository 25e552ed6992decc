"""Packed batches: padding is removed before the embeddings.

`pack` turns ids and mask into tokens ``[T]`` with ``offsets [B + 1]``; `compact_batch` moves live rows together.

On CUDA the lengths of the rows stay on the device, and a batch may have more room than rows and tokens. Then the last
rows have no tokens and the last tokens belong to no row; these hold uninitialised memory, NaN included. They affect no
row: layers and heads treat each token separately, attention reads and writes only the tokens within the offsets, and
exits read only rows with an id.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from earlyexit_kernels.hashing import token_keys
from earlyexit_kernels.ops import bare_op


@dataclass(frozen=True)
class PackedBatch:
    """A batch without padding.

    Attributes:
        tokens: ``[T]`` index of each kept token in the flattened ``[N * S]`` input, or None if all are kept.
        offsets: ``[B + 1]`` int32.
        row_ids: ``[B]`` int32, request row of each row, -1 for a row that has left.
        lengths: tokens of each row, or None on CUDA, where the host does not know them.
        longest: upper bound of the lengths.
    """

    tokens: Tensor | None
    offsets: Tensor
    row_ids: Tensor
    lengths: tuple[int, ...] | None
    longest: int

    def take(self, values: Tensor) -> Tensor:
        """Return the kept tokens of ``[N, S]`` integers as ``[1, T]`` int64."""
        flat = values.reshape(-1).long()
        return (flat if self.tokens is None else flat[self.tokens])[None]


def pack(input_ids: Tensor, attention_mask: Tensor | None, *, first_token: bool = False) -> PackedBatch:
    """Remove the padding of a batch.

    On CUDA a mask costs one synchronisation, before other work is queued: the host needs the number of tokens to launch
    the products of the layers, and running them on the padding would cost more.

    Args:
        input_ids: ``[N, S]``, N and S at least 1.
        attention_mask: ``[N, S]``, nonzero for tokens to keep; holes are supported. A row without tokens keeps its
            first one: its answer is finite but meaningless, and does not affect other rows.
        first_token: refuse a row whose first token is masked while others are kept.

    Raises:
        ValueError: such a row, with `first_token`.
    """
    n, s = input_ids.shape
    device = input_ids.device
    on_host = device.type != "cuda"
    if attention_mask is not None:
        packed = (_pack_on_host if on_host else _pack_on_device)(attention_mask != 0, first_token)
        if packed is not None:
            return packed
    offsets = torch.arange(0, n * s + 1, s, dtype=torch.int32, device=device)
    row_ids = torch.arange(n, dtype=torch.int32, device=device)
    return PackedBatch(None, offsets, row_ids, (s,) * n if on_host else None, s)


def _pack_on_host(keep: Tensor, first_token: bool) -> PackedBatch | None:
    """Pack by a mask ``[N, S]`` bool, which is **changed**; return None if it keeps all tokens."""
    n, s = keep.shape
    if bool(keep.all()):
        return None
    first = keep[:, 0]
    if not bool(first.all()):
        empty = ~keep.any(dim=1)
        if first_token:
            check_first_tokens(~(first | empty))
        first |= empty
    counts = keep.sum(dim=1)
    offsets = torch.zeros(n + 1, dtype=torch.int32, device=keep.device)
    offsets[1:] = counts.cumsum(0)
    row_ids = torch.arange(n, dtype=torch.int32, device=keep.device)
    return PackedBatch(keep.flatten().nonzero()[:, 0], offsets, row_ids, tuple(counts.tolist()), s)


def _pack_on_device(keep: Tensor, first_token: bool) -> PackedBatch | None:
    """Pack as `_pack_on_host` does, with one synchronisation; the lengths stay on the device."""
    n, s = keep.shape
    first, empty = keep[:, 0], ~keep.any(dim=1)
    masked = ~(first | empty)
    first |= empty
    counts = keep.sum(dim=1)
    tokens, longest, refused = torch.stack((counts.sum(), counts.max(), masked.any().long())).tolist()
    if first_token and refused:
        check_first_tokens(masked)
    if tokens == n * s:
        return None
    offsets = torch.zeros(n + 1, dtype=torch.int32, device=keep.device)
    offsets[1:] = counts.cumsum(0)
    flat = keep.flatten()
    # the index of each token goes to its place, those of the padding to a spare place at the end
    place = (flat.cumsum(0) - 1).masked_fill(~flat, tokens)
    index = torch.empty(tokens + 1, dtype=torch.int64, device=keep.device)
    index.scatter_(0, place, torch.arange(n * s, device=keep.device))
    row_ids = torch.arange(n, dtype=torch.int32, device=keep.device)
    return PackedBatch(index[:tokens], offsets, row_ids, None, longest)


def check_first_tokens(masked: Tensor, before: int = 0) -> None:
    """Check that the exits can read the first token of each row.

    Args:
        masked: ``[N]`` bool, whether the first token of a row is masked while others are kept.
        before: rows of the request before these.

    Raises:
        ValueError: names the first such row.
    """
    if bool(masked.any()):
        raise ValueError(
            f"attention_mask: the first token of row {before + int(masked.nonzero()[0])} is masked, but these exits "
            "read it; pad on the right (tokenizer.padding_side = 'right')"
        )


def row_keys(ids: Tensor, offsets: Tensor) -> Tensor:
    """Return a hash ``[N]`` int64 of each row, which depends only on its kept tokens and their order.

    Args:
        ids: packed token ids ``[1, T]`` int64.
        offsets: ``[N + 1]`` int32.
    """
    ends = offsets.long()
    place = torch.arange(ids.shape[1], device=ids.device) - ends[:-1].repeat_interleave(
        offsets.diff(), output_size=ids.shape[1]
    )
    sums = torch.zeros(ids.shape[1] + 1, dtype=torch.int64, device=ids.device)
    sums[1:] = token_keys(ids[0], place).cumsum(0)
    return sums[ends[1:]] - sums[ends[:-1]]


def compact_batch(
    batch: PackedBatch, hidden: Tensor, live: int, tokens: int, backend: str
) -> tuple[PackedBatch, Tensor, Tensor]:
    """Copy the live rows, in order, into a smaller buffer.

    Args:
        batch, hidden: the rows and their tokens ``[1, T, H]``.
        live, tokens: number of live rows and of their tokens. If the host does not know the lengths, these are upper
            bounds; the surplus rows have id -1 and no tokens. Their offsets are within `tokens`, since each row that
            left had at least one.
        backend: of the ops.

    Returns:
        The smaller batch, its tokens ``[1, tokens, H]``, and the old index ``[live]`` int32 of each row, -1 for none.
    """
    device = hidden.device
    compact, gather_rows = bare_op("compact", backend, device), bare_op("gather_rows", backend, device)
    row_ids, offsets, source = compact(batch.row_ids, batch.offsets)
    row_ids, offsets, source = row_ids[:live], offsets[: live + 1], source[:live]
    out = hidden.new_empty(1, tokens, hidden.shape[2])
    gather_rows(hidden[0].contiguous(), batch.offsets, source, offsets, out[0])
    lengths = None if batch.lengths is None else tuple(batch.lengths[i] for i in source.tolist())
    return PackedBatch(None, offsets, row_ids, lengths, batch.longest), out, source


def scatter_rows(
    part: PackedBatch, part_hidden: Tensor, source: Tensor, batch: PackedBatch, hidden: Tensor, backend: str
) -> None:
    """Copy the tokens and row ids of some rows back to their positions in the whole batch.

    Args:
        part, part_hidden, source: from `compact_batch`; row ids may have become -1 since.
        batch, hidden: all rows and their tokens ``[1, T, H]``. **Changed.**
        backend: of the ops.
    """
    place = torch.full_like(batch.row_ids, -1)
    index = source.long()
    place[index] = torch.arange(source.shape[0], dtype=torch.int32, device=source.device)
    gather_rows = bare_op("gather_rows", backend, hidden.device)
    gather_rows(part_hidden[0].contiguous(), part.offsets, place, batch.offsets, hidden[0])
    batch.row_ids[index] = part.row_ids
