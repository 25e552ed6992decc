"""Packed batches: padding is removed before the embeddings.

`pack` turns ids and mask into tokens ``[T]`` with ``offsets [B + 1]``; `rows` moves live rows together.

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


def check_first_tokens(masked: Tensor) -> None:
    """Check that the exits can read the first token of each row.

    Args:
        masked: ``[N]`` bool, whether the first token of a row is masked while others are kept.

    Raises:
        ValueError: names the first such row.
    """
    if bool(masked.any()):
        raise ValueError(
            f"attention_mask: the first token of row {int(masked.nonzero()[0])} is masked, but these exits "
            "read it; pad on the right (tokenizer.padding_side = 'right')"
        )


def row_keys(ids: Tensor, offsets: Tensor) -> Tensor:
    """Return a hash ``[N]`` int64 of each row, which depends only on its kept tokens and their order.

    Args:
        ids: packed token ids ``[1, T]`` int64.
        offsets: ``[N + 1]`` int32.
    """
    ends = offsets.long()
    _, place = rows_of_tokens(offsets, ids.shape[1])
    sums = torch.zeros(ids.shape[1] + 1, dtype=torch.int64, device=ids.device)
    sums[1:] = token_keys(ids[0], place).cumsum(0)
    return sums[ends[1:]] - sums[ends[:-1]]


def rows_of_tokens(offsets: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Return the row of each of T packed tokens and its place in the row, both ``[T]`` int64.

    Tokens of no row get the last row, and places beyond its end.
    """
    token = torch.arange(tokens, device=offsets.device)
    row = torch.searchsorted(offsets[1:].long(), token, right=True).clamp(max=offsets.shape[0] - 2)
    return row, token - offsets[:-1].long()[row]


def last_kept(keep: Tensor) -> Tensor:
    """Return the column ``[N]`` of the last kept token of each row ``[N, S]``, 0 for a row without any."""
    return torch.where(keep, torch.arange(keep.shape[1], device=keep.device), 0).amax(dim=1)


def up_to_last(ids: Tensor, mask: Tensor | None, pad_token_id: int | None) -> Tensor | None:
    """Return the mask ``[N, S]`` without tokens behind the one that a stock decoder answers from, None for no mask.

    That is the last token of a row that is not the padding token. Those behind it do not affect a causal answer.

    Args:
        ids: ``[N, S]``.
        mask: ``[N, S]`` or None.
        pad_token_id: of the backbone, or None: the answer is that of the last token that is kept.

    Raises:
        ValueError: that token is masked, on the CPU.
    """
    if pad_token_id is None:
        return mask
    last = last_kept(ids != pad_token_id)
    columns = torch.arange(ids.shape[1], device=ids.device)
    keep = columns <= last[:, None]
    if mask is None:
        return keep
    kept = mask != 0
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():
        masked = kept.any(dim=1) & ~kept.gather(1, last[:, None])[:, 0]
        if bool(masked.any()):
            raise ValueError(
                f"attention_mask: the last token of row {int(masked.nonzero()[0])} that is not padding is masked, but "
                "the answer is read from it; keep it, or replace masked ids by the padding token"
            )
    return kept & keep
