"""Packed tokens: padding leaves before the embeddings, and attention runs row by row over what remains.

`pack` turns ids and mask into tokens ``[T]`` with ``offsets [B + 1]``; `plan_attention` groups rows for the attention
function registered with transformers under `PACKED_ATTENTION`, which a family's own layers then call.

On CUDA the lengths of the rows stay on the device. There a batch may have more room than rows and tokens: rows at the
end own no token, and tokens at the end belong to no row. What stands in those is whatever the memory held, NaN too.
Layers and heads treat tokens one by one, attention reads and writes only what the offsets give to a row, and exits look
at the rows with an id: so nothing of them reaches a row.
"""

from __future__ import annotations

import functools
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
from earlyexit_kernels.ops import compaction_ops

PACKED_ATTENTION = "earlyexit_packed"
#: The widest heads that flash attention takes, and the number of which widths must be a multiple.
FLASH_WIDTH = 256
WIDTH_STEP = 8
#: Rows share a bucket while the longest has at most this many tokens, or this factor, more than the shortest.
BUCKET_SLACK_TOKENS = 8
BUCKET_SLACK_FACTOR = 1.25


@dataclass(frozen=True)
class LengthBucket:
    """Rows of similar length, attended together as ``[rows, width]``.

    Attributes:
        rows, width: the rectangle.
        slots: ``[rows * width]`` packed token of each slot, or None where the packed tokens are the rectangle. A
            filler slot holds its own row's last token, so that nothing of another row, NaN included, can reach it.
        mask: ``[rows, 1, 1, width]`` bool, or None where every slot is a token.
        kept: slots that are tokens, or None where all are.
    """

    rows: int
    width: int
    slots: Tensor | None = None
    mask: Tensor | None = None
    kept: Tensor | None = None


@dataclass(frozen=True)
class AttentionPlan:
    """How the rows of one packed batch are attended: in buckets, or in one call where the lengths aren't known.

    Attributes:
        buckets: the rectangles, of similar length each.
        inverse: ``[T]`` place of each packed token among the buckets' tokens; None where they are in order.
        offsets, longest: for the variable-length kernel; no row is longer than `longest`.
    """

    buckets: tuple[LengthBucket, ...] = ()
    inverse: Tensor | None = None
    offsets: Tensor | None = None
    longest: int = 0

    @functools.cached_property
    def bucket_lists(self) -> tuple[list[Any], ...]:
        """Rows, widths, slots, masks and kept of the buckets, as the fused layers want them."""
        return tuple([getattr(b, name) for b in self.buckets] for name in ("rows", "width", "slots", "mask", "kept"))


@dataclass(frozen=True)
class PackedBatch:
    """One batch without padding.

    Attributes:
        tokens: ``[T]`` index of each kept token in the flattened ``[N * S]`` input, or None where all are kept.
        offsets: ``[B + 1]`` int32.
        row_ids: ``[B]`` int32, request row of each row present; -1 where it has left.
        lengths: tokens of each row, or None where the host doesn't know them, which is on CUDA.
        longest: no row has more tokens.
    """

    tokens: Tensor | None
    offsets: Tensor
    row_ids: Tensor
    lengths: tuple[int, ...] | None
    longest: int

    def take(self, values: Tensor) -> Tensor:
        """Pick the kept tokens of ``[N, S]`` integers as ``[1, T]`` int64."""
        flat = values.reshape(-1).long()
        return (flat if self.tokens is None else flat[self.tokens])[None]


class PackedStates(NamedTuple):
    """Hidden states ``[T, H]`` of packed rows, their offsets ``[B + 1]`` and the attention over them."""

    hidden: Tensor
    offsets: Tensor
    plan: AttentionPlan

    @property
    def rows(self) -> int:
        """As in `RowStates`, like what follows."""
        return self.offsets.shape[0] - 1

    def pool(self, tokens: Tensor, pooling: str | None) -> Tensor:
        """Of tokens ``[T, F]``."""
        if pooling == "mean":
            return torch.segment_reduce(tokens.float(), "mean", offsets=self.offsets.long(), axis=0)
        return tokens.index_select(0, self.offsets[:-1])

    def attend(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        """Of ``[T, heads, D]``."""
        return attend_by_plan(query, key, value, self.plan, None, dropout)


def pack(input_ids: Tensor, attention_mask: Tensor | None, *, first_token: bool = False) -> PackedBatch:
    """Drop the padding of a batch.

    On CUDA a mask costs one synchronisation, before anything else is in the queue: the products of all layers are
    launched for a number of tokens that only the mask tells, and running them over the padding would cost more.

    Args:
        input_ids: ``[N, S]``, N and S at least 1.
        attention_mask: ``[N, S]``, nonzero for tokens to keep, holes allowed. A row without any keeps its first token:
            its answer is finite and touches no other row, and means nothing.
        first_token: refuse a row that has tokens, but not its first.

    Raises:
        ValueError: such a row.
    """
    n, s = input_ids.shape
    device = input_ids.device
    seen = device.type != "cuda"
    if attention_mask is not None:
        packed = (_pack_on_host if seen else _pack_on_device)(attention_mask != 0, first_token)
        if packed is not None:
            return packed
    offsets = torch.arange(0, n * s + 1, s, dtype=torch.int32, device=device)
    row_ids = torch.arange(n, dtype=torch.int32, device=device)
    return PackedBatch(None, offsets, row_ids, (s,) * n if seen else None, s)


def _pack_on_host(keep: Tensor, first_token: bool) -> PackedBatch | None:
    """Pack by a mask ``[N, S]`` bool, which is **changed**; None where it keeps everything."""
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
    """`_pack_on_host` with one look at the device, and the lengths left there."""
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
    # each token's index goes to its place, the indices of the padding to a spare place behind
    place = (flat.cumsum(0) - 1).masked_fill(~flat, tokens)
    index = torch.empty(tokens + 1, dtype=torch.int64, device=keep.device)
    index.scatter_(0, place, torch.arange(n * s, device=keep.device))
    row_ids = torch.arange(n, dtype=torch.int32, device=keep.device)
    return PackedBatch(index[:tokens], offsets, row_ids, None, longest)


def refuse_masked_first(refused: bool) -> None:
    """Raise ValueError where a row has tokens, but not its first, which the exits read."""
    if refused:
        raise ValueError(
            "attention_mask: the first token of a row is masked, but these exits read it; pad on the right, or convert "
            "with pooling='mean'"
        )


def row_keys(ids: Tensor, offsets: Tensor) -> Tensor:
    """A number ``[N]`` int64 for each row that depends on its kept tokens and their order alone.

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


def shrink(
    batch: PackedBatch, hidden: Tensor, live: int, tokens: int, backend: str
) -> tuple[PackedBatch, Tensor, Tensor]:
    """Move the live rows together, in order, into a second buffer.

    Args:
        batch, hidden: the rows present and their tokens ``[1, T, H]``.
        live, tokens: how many rows are live and how many tokens they have; or what they were before some rows left,
            where the lengths aren't known: the room for those remains behind, without an owner. No such row's place
            lies beyond the tokens, since each that left had one at least.
        backend: of the ops.

    Returns:
        The smaller batch, its tokens ``[1, tokens, H]``, and the place ``[live]`` int32 each row had, -1 for none.
    """
    compact, gather_rows = compaction_ops(backend, hidden.device.type)
    row_ids, offsets, source = compact(batch.row_ids, batch.offsets)
    row_ids, offsets, source = row_ids[:live], offsets[: live + 1], source[:live]
    out = hidden.new_empty(1, tokens, hidden.shape[2])
    gather_rows(hidden[0].contiguous(), batch.offsets, source, offsets, out[0])
    lengths = None if batch.lengths is None else tuple(batch.lengths[i] for i in source.tolist())
    return PackedBatch(None, offsets, row_ids, lengths, batch.longest), out, source


def put_back(
    part: PackedBatch, part_hidden: Tensor, source: Tensor, batch: PackedBatch, hidden: Tensor, backend: str
) -> None:
    """Write the tokens and row ids of a part of the rows to the places they came from.

    Args:
        part, part_hidden, source: as `shrink` gave them; row ids may have become -1 since.
        batch, hidden: all rows and their tokens ``[1, T, H]``. **Changed.**
        backend: of the ops.
    """
    place = torch.full_like(batch.row_ids, -1)
    index = source.long()
    place[index] = torch.arange(source.shape[0], dtype=torch.int32, device=source.device)
    gather_rows = compaction_ops(backend, hidden.device.type)[1]
    gather_rows(part_hidden[0].contiguous(), part.offsets, place, batch.offsets, hidden[0])
    batch.row_ids[index] = part.row_ids


def plan_attention(batch: PackedBatch) -> AttentionPlan:
    """Group the rows of a batch for attention; done once a batch and once a compaction, not once a layer."""
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
    """A bucket of rows with these first tokens and lengths, ascending, and its tokens in order."""
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
    """The attention function registered with transformers; without a plan it is the stock sdpa.

    Args:
        query, key, value: ``[1, heads, T, D]`` over packed tokens.
        plan: which tokens form a row; handed down by the engine through the layers' keyword arguments.

    Returns:
        ``[1, T, heads, D]`` and no attention weights.

    Raises:
        ValueError: with a plan, a mask or another keyword argument is given; its effect isn't implemented.
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
    """Attention within the rows of packed tokens, over and to ``[T, heads, D]``."""
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
    """Variable-length attention on CUDA, ``[T, heads, D]``: flash attention, or the memory-efficient one for what that
    doesn't take.

    Both by their aten names: the public face of the one lacks dropout, and the other has none. Both pass over rows
    without tokens, and leave tokens behind the last row as the memory was.
    """
    width, ends = q.shape[-1], (plan.offsets, plan.offsets, plan.longest, plan.longest, dropout)
    scale = width**-0.5 if scaling is None else scaling
    if width % WIDTH_STEP:
        q, k, v = (F.pad(x, (0, -width % WIDTH_STEP)) for x in (q, k, v))
    if q.dtype != torch.float32 and q.shape[-1] <= FLASH_WIDTH:
        out = torch.ops.aten._flash_attention_forward(q, k, v, *ends, False, False, scale=scale)[0]
    else:
        learns = any(x.requires_grad for x in (q, k, v))
        q, k, v = (x[None] for x in (q, k, v))
        out = torch.ops.aten._efficient_attention_forward(q, k, v, None, *ends, 0, learns, scale=scale)[0][0]
    return out[..., :width]


def check_attention(attention: str) -> None:
    """Raise AttentionReplacedError where a backbone's attention isn't ours any more."""
    if attention != PACKED_ATTENTION:
        raise AttentionReplacedError(
            f"the backbone's attention is {attention!r}, expected {PACKED_ATTENTION!r}; under another one the rows of "
            "a batch attend to each other. Convert the model again"
        )


def register_attention() -> None:
    """Tell transformers of `packed_attention`, in the mask table too: a name absent there gets no padding mask."""
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
