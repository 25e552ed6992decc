"""Packed batches: padding is removed before the embeddings, and attention runs within each row.

`pack` turns ids and mask into tokens ``[T]`` with ``offsets [B + 1]``; `plan_attention` groups the rows for the
attention function that is registered with transformers as `PACKED_ATTENTION` and called by a family's own layers.

On CUDA the lengths of the rows stay on the device, and a batch may have more room than rows and tokens. Then the last
rows have no tokens and the last tokens belong to no row; these hold uninitialised memory, NaN included. They affect no
row: layers and heads treat each token separately, attention reads and writes only the tokens within the offsets, and
exits read only rows with an id.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from earlyexit_kernels.errors import AttentionReplacedError
from earlyexit_kernels.hashing import token_keys
from earlyexit_kernels.ops import bare_op
from earlyexit_kernels.types import normed

PACKED_ATTENTION = "earlyexit_packed"
#: Maximum head width of flash attention, and the number that head widths must be a multiple of.
MAX_FLASH_WIDTH = 256
HEAD_WIDTH_MULTIPLE = 8
#: Rows share a bucket if the longest has at most this many tokens, or this factor, more than the shortest.
BUCKET_SLACK_TOKENS = 8
BUCKET_SLACK_FACTOR = 1.25


@dataclass(frozen=True)
class LengthBucket:
    """Rows of similar length, attended together as a rectangle ``[rows, width]``.

    Attributes:
        rows, width: size of the rectangle.
        slots: ``[rows * width]`` packed token in each slot, or None if the packed tokens are the rectangle. A filler
            slot holds the last token of its own row, so that no value of another row, NaN included, affects it.
        mask: ``[rows, 1, 1, width]`` bool, False for filler slots, or None without fillers.
        kept: slots that are not fillers, or None without fillers.
    """

    rows: int
    width: int
    slots: Tensor | None = None
    mask: Tensor | None = None
    kept: Tensor | None = None


@dataclass(frozen=True)
class AttentionPlan:
    """How the rows of a packed batch are attended: in buckets, or in one call if the lengths are on the device.

    Attributes:
        buckets: rectangles of rows of similar length.
        inverse: ``[T]`` position of each packed token among the tokens of the buckets, or None if they are in order.
        offsets, longest: arguments of the variable-length kernel; no row is longer than `longest`.
    """

    buckets: tuple[LengthBucket, ...] = ()
    inverse: Tensor | None = None
    offsets: Tensor | None = None
    longest: int = 0

    @functools.cached_property
    def bucket_lists(self) -> tuple[list[Any], ...]:
        """Rows, widths, slots, masks and kept of the buckets, the arguments of `ops.encoder_layer`."""
        return tuple([getattr(b, name) for b in self.buckets] for name in ("rows", "width", "slots", "mask", "kept"))


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


class PackedStates(NamedTuple):
    """Hidden states ``[T, H]`` of packed rows, their offsets ``[B + 1]`` and attention plan; a `types.RowStates`."""

    hidden: Tensor
    offsets: Tensor
    plan: AttentionPlan
    norm: Callable[[Tensor], Tensor] | None = None

    @property
    def tokens(self) -> Tensor:
        """``[T, H]`` after the norm."""
        return normed(self.norm, self.hidden)

    @property
    def rows(self) -> int:
        """B."""
        return self.offsets.shape[0] - 1

    def pooled(self, pooling: str | None) -> Tensor:
        """Return one vector ``[B, H]`` per row, as in `RowStates`; of first tokens only these pass the norm."""
        if pooling == "mean":
            return self.pool(self.tokens, pooling)
        return normed(self.norm, self.pool(self.hidden, pooling))

    def pool(self, tokens: Tensor, pooling: str | None) -> Tensor:
        """Return one vector ``[B, F]`` per row of tokens ``[T, F]``, as in `RowStates`."""
        if pooling == "mean":
            return torch.segment_reduce(tokens.float(), "mean", offsets=self.offsets.long(), axis=0)
        return tokens.index_select(0, self.offsets[:-1])

    def attend(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        """Return attention within each row, over and to ``[T, heads, D]``."""
        return attend_by_plan(query, key, value, self.plan, None, dropout)


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
        refuse_masked_first(first_token and not bool((first | empty).all()))
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
    masked_first = ~(first | empty).all()
    first |= empty
    counts = keep.sum(dim=1)
    tokens, longest, refused = torch.stack((counts.sum(), counts.max(), masked_first.long())).tolist()
    refuse_masked_first(first_token and bool(refused))
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


def refuse_masked_first(refused: bool) -> None:
    """Raise ValueError if the first token of a row is masked, which the exits read."""
    if refused:
        raise ValueError(
            "attention_mask: the first token of a row is masked, but these exits read it; pad on the right "
            "(tokenizer.padding_side = 'right')"
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
    device = hidden.device.type
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
    gather_rows = bare_op("gather_rows", backend, hidden.device.type)
    gather_rows(part_hidden[0].contiguous(), part.offsets, place, batch.offsets, hidden[0])
    batch.row_ids[index] = part.row_ids


def plan_attention(batch: PackedBatch) -> AttentionPlan:
    """Group the rows of a batch for attention: once per batch and compaction, not per layer."""
    lengths, device = batch.lengths, batch.offsets.device
    if lengths is None:
        return AttentionPlan(offsets=batch.offsets, longest=batch.longest)
    if min(lengths) == max(lengths):
        return AttentionPlan(buckets=(LengthBucket(len(lengths), lengths[0]),))
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    widths = np.array(lengths, dtype=np.int64)
    starts = widths.cumsum() - widths
    buckets, kept = [], []
    while order:
        limit = max(lengths[order[0]] + BUCKET_SLACK_TOKENS, int(lengths[order[0]] * BUCKET_SLACK_FACTOR))
        size = next((k for k, row in enumerate(order) if lengths[row] > limit), len(order))
        bucket, tokens = _bucket(starts[order[:size]], widths[order[:size]], device)
        buckets.append(bucket)
        kept.append(tokens)
        order = order[size:]
    token_of_place = np.concatenate(kept)
    inverse = np.empty_like(token_of_place)
    inverse[token_of_place] = np.arange(token_of_place.size)
    return AttentionPlan(buckets=tuple(buckets), inverse=torch.from_numpy(inverse).to(device))


def _bucket(starts: np.ndarray, lengths: np.ndarray, device: torch.device) -> tuple[LengthBucket, np.ndarray]:
    """Return a bucket of rows with these first tokens and ascending lengths, and its tokens in order."""
    rows, width = len(lengths), int(lengths[-1])
    column = np.arange(width)
    slots = (starts[:, None] + np.minimum(column, lengths[:, None] - 1)).ravel()
    if lengths[0] == width:
        return LengthBucket(rows, width, torch.from_numpy(slots).to(device)), slots
    real = column < lengths[:, None]
    kept = real.ravel().nonzero()[0]
    mask, places = torch.from_numpy(real[:, None, None, :]), torch.from_numpy(kept)
    bucket = LengthBucket(rows, width, torch.from_numpy(slots).to(device), mask.to(device), places.to(device))
    return bucket, slots[kept]


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    plan: AttentionPlan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function registered with transformers; without a plan it is the stock sdpa.

    Args:
        query, key, value: ``[1, heads, T, D]`` of packed tokens.
        plan: which tokens form a row; the engine passes it through the keyword arguments of the layers.

    Returns:
        ``[1, T, heads, D]``, and None for the attention weights.

    Raises:
        ValueError: a plan together with a mask or another keyword argument, which are not implemented.
    """
    if plan is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    others = {"attention_mask": attention_mask, **kwargs}
    if asked := [name for name, given in others.items() if given is not None and given is not False]:
        got = f"{', '.join(asked)} from {type(module).__name__}"
        raise ValueError(f"packed attention supports plan, scaling and dropout, others as None or False, got {got}")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return attend_by_plan(q, k, v, plan, scaling, dropout)[None], None


def attend_by_plan(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scaling: float | None, dropout: float
) -> Tensor:
    """Return attention within the rows of packed tokens, over and to ``[T, heads, D]``."""
    if plan.offsets is not None:
        return _varlen(q, k, v, plan, scaling, dropout)
    parts = []
    for bucket in plan.buckets:
        shape = (bucket.rows, bucket.width, *q.shape[1:])
        slots = bucket.slots
        bq, bk, bv = ((x if slots is None else x.index_select(0, slots)).view(shape).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(bq, bk, bv, attn_mask=bucket.mask, dropout_p=dropout, scale=scaling)
        out = out.transpose(1, 2).reshape(-1, *q.shape[1:])
        parts.append(out if bucket.kept is None else out.index_select(0, bucket.kept))
    return parts[0] if plan.inverse is None else torch.cat(parts).index_select(0, plan.inverse)


def _varlen(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scaling: float | None, dropout: float) -> Tensor:
    """Variable-length attention on CUDA, ``[T, heads, D]``: flash attention, or else memory-efficient attention.

    Both are called by their private aten names. `torch.nn.attention.varlen.varlen_attn` calls the same flash kernel but
    has no dropout, which training needs, and no float32; there is no public function for the memory-efficient kernel.
    Both kernels skip rows without tokens and do not write tokens after the last row.
    """
    width, ends = q.shape[-1], (plan.offsets, plan.offsets, plan.longest, plan.longest, dropout)
    scale = width**-0.5 if scaling is None else scaling
    if width % HEAD_WIDTH_MULTIPLE:
        q, k, v = (F.pad(x, (0, -width % HEAD_WIDTH_MULTIPLE)) for x in (q, k, v))
    if q.dtype != torch.float32 and q.shape[-1] <= MAX_FLASH_WIDTH:
        out = torch.ops.aten._flash_attention_forward(q, k, v, *ends, False, False, scale=scale)[0]
    else:
        learns = any(x.requires_grad for x in (q, k, v))
        q, k, v = (x[None] for x in (q, k, v))
        out = torch.ops.aten._efficient_attention_forward(q, k, v, None, *ends, 0, learns, scale=scale)[0][0]
    return out[..., :width]


def check_attention(attention: str) -> None:
    """Raise AttentionReplacedError if the attention of a backbone is no longer `packed_attention`."""
    if attention != PACKED_ATTENTION:
        raise AttentionReplacedError(
            f"expected the backbone's attention to be {PACKED_ATTENTION!r}, got {attention!r}, under which the rows of "
            "a batch would attend to each other. If it was set by set_attn_implementation, set it back; if "
            "model.backbone is a stock encoder now, put that encoder into the stock classifier and convert it with "
            "to_early_exit"
        )


def register_attention() -> None:
    """Register `packed_attention` with transformers, also for masks: an unregistered name gets no padding mask."""
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
