"""Plans of attention: which tokens form a row, in which groups rows are attended, and which tokens attend to which.

`plan_attention` makes the plan of a packed batch, once for each batch and compaction; `attention` follows it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from earlyexit_kernels.engine.packing import PackedBatch

#: Rows share a bucket if the longest has at most this many tokens, or this factor, more than the shortest.
BUCKET_SLACK_TOKENS = 8
BUCKET_SLACK_FACTOR = 1.25


class AttentionKind(NamedTuple):
    """Which tokens of its row a token attends to, and how.

    Attributes:
        causal: only to itself and to earlier ones.
        window: only to those fewer than this many columns away; None: to all.
        softcap: scores x become ``softcap * tanh(x / softcap)``; None: they stay.
    """

    causal: bool = False
    window: int | None = None
    softcap: float | None = None


FULL, CAUSAL = AttentionKind(), AttentionKind(causal=True)


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

    def gather(self, tokens: Tensor) -> Tensor:
        """Return packed tokens ``[T, ...]`` as the rectangle ``[rows, width, ...]``."""
        chosen = tokens if self.slots is None else tokens.index_select(0, self.slots)
        return chosen.view(self.rows, self.width, *tokens.shape[1:])

    def columns(self, columns: Tensor | None, device: torch.device) -> Tensor:
        """Return the column of the token in each slot, ``[rows or 1, width]``.

        Args:
            columns: ``[T]`` of the packed tokens, or None if each is the place of the token in its row.
            device: of the result.
        """
        if self.slots is None:
            ordered = torch.arange(self.width, device=device)[None]
            return ordered if columns is None else columns.view(self.rows, self.width)
        slots = self.slots.view(self.rows, self.width)
        return slots - slots[:, :1] if columns is None else columns[slots]


@dataclass(frozen=True)
class AttentionPlan:
    """How the rows of a packed batch are attended: in buckets, or in one call if the lengths are on the device.

    Attributes:
        buckets: rectangles of rows of similar length.
        inverse: ``[T]`` position of each packed token among the tokens of the buckets, or None if they are in order.
        offsets, longest: arguments of the variable-length kernel; no row is longer than `longest`.
        ends: ``[R + 1]`` int32 offsets of the rows on the CPU.
        columns: ``[T]`` column of each token in its padded row, or None if that is its place in the row, up to a
            constant.
        masks: of the buckets, by kind; filled when a layer first asks for one.
        rectangles: plans of `rectangle`, by the number of tokens.
    """

    buckets: tuple[LengthBucket, ...] = ()
    inverse: Tensor | None = None
    offsets: Tensor | None = None
    longest: int = 0
    ends: Tensor | None = None
    columns: Tensor | None = None
    masks: dict[AttentionKind, list[Tensor | None]] = field(default_factory=dict, compare=False)
    rectangles: dict[int, AttentionPlan] = field(default_factory=dict, compare=False)

    @functools.cached_property
    def bucket_lists(self) -> tuple[list[Any], ...]:
        """Rows, widths, slots, masks and kept of the buckets, the arguments of `ops.encoder_layer`."""
        return tuple([getattr(b, name) for b in self.buckets] for name in ("rows", "width", "slots", "mask", "kept"))

    def join(self, rectangles: Sequence[Tensor]) -> Tensor:
        """Return the packed tokens ``[T, ...]`` of a rectangle ``[rows, width, ...]`` for each bucket."""
        flat = (x.flatten(0, 1) for x in rectangles)
        parts = [
            x if bucket.kept is None else x.index_select(0, bucket.kept)
            for bucket, x in zip(self.buckets, flat, strict=True)
        ]
        return parts[0] if self.inverse is None else torch.cat(parts).index_select(0, self.inverse)

    def rectangle(self, tokens: int) -> AttentionPlan:
        """Return `one_rectangle` of this plan and T tokens; made once."""
        if tokens not in self.rectangles:
            self.rectangles[tokens] = one_rectangle(self, tokens)
        return self.rectangles[tokens]

    def masks_of(self, kind: AttentionKind, device: torch.device) -> list[Tensor | None]:
        """Return the mask ``[rows or 1, 1, width or 1, width]`` bool of each bucket, None where the kind needs none.

        Causal attention alone needs none, since fillers are behind the tokens of their row.
        """
        if kind not in self.masks:
            self.masks[kind] = [self._mask(kind, bucket, device) for bucket in self.buckets]
        return self.masks[kind]

    def _mask(self, kind: AttentionKind, bucket: LengthBucket, device: torch.device) -> Tensor | None:
        if kind.window is not None and self.columns is None and kind.window >= bucket.width:
            kind = kind._replace(window=None)
        if kind == CAUSAL:
            return None
        return allowed(kind, bucket.mask, functools.partial(bucket.columns, self.columns, device))


@dataclass(frozen=True)
class PaddedPlan:
    """Attention within padded rows ``[N, S]``, for a pass of fixed shape.

    Attributes:
        keep: ``[N, S]`` bool, the tokens; None: all are.
    """

    keep: Tensor | None

    def mask(self, kind: AttentionKind, query: Tensor) -> Tensor | None:
        """Return the mask of a layer whose queries are ``[N, heads, S, D]``; every slot may attend to itself."""
        columns = torch.arange(query.shape[2], device=query.device)
        keys = None if self.keep is None else self.keep[:, None, None, :]
        mask = allowed(kind, keys, lambda: columns[None])
        return mask if mask is None or mask is keys else mask | (columns[:, None] == columns)


def allowed(kind: AttentionKind, keys: Tensor | None, columns: Callable[[], Tensor]) -> Tensor | None:
    """Return which tokens of a rectangle attend to which, ``[rows or 1, 1, width or 1, width]``, or None for all.

    Args:
        kind: of the attention.
        keys: ``[rows, 1, 1, width]`` bool, the tokens that may be attended to, or None for all.
        columns: returns the column of each token, ``[rows or 1, width]``.
    """
    if not kind.causal and kind.window is None:
        return keys
    places = columns()
    distance = places[:, None, :, None] - places[:, None, None, :]
    mask = distance >= 0 if kind.causal else None
    if kind.window is not None:
        near = distance.abs() < kind.window
        mask = near if mask is None else mask & near
    return mask if keys is None else mask & keys  # type: ignore[operator]


def plan_attention(batch: PackedBatch, columns: Tensor | None = None) -> AttentionPlan:
    """Group the rows of a batch for attention: once per batch and compaction, not per layer.

    Args:
        batch: the rows.
        columns: ``[T]`` of their tokens, if these are needed and not the places in the rows.
    """
    lengths, device = batch.lengths, batch.offsets.device
    if lengths is None:
        return AttentionPlan(offsets=batch.offsets, longest=batch.longest, columns=columns)
    if min(lengths) == max(lengths):
        return AttentionPlan(buckets=(LengthBucket(len(lengths), lengths[0]),), ends=batch.offsets, columns=columns)
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
    places = torch.from_numpy(inverse).to(device)
    return AttentionPlan(buckets=tuple(buckets), inverse=places, ends=batch.offsets, columns=columns)


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


def one_rectangle(plan: AttentionPlan, tokens: int) -> AttentionPlan:
    """Return a plan with all rows in one bucket as wide as the longest may be, from offsets on the device.

    Args:
        plan: with offsets.
        tokens: T; tokens of no row are among them.
    """
    offsets: Any = plan.offsets
    starts, lengths = offsets[:-1].long(), offsets.diff().long()
    column = torch.arange(plan.longest, device=offsets.device)
    last = (lengths - 1).clamp(min=0)[:, None]
    slots = (starts[:, None] + torch.minimum(column, last)).clamp(max=tokens - 1)
    row, place = rows_of_tokens(offsets, tokens)
    return AttentionPlan(
        buckets=(LengthBucket(len(starts), plan.longest, slots.flatten(), (column <= last)[:, None, None, :]),),
        inverse=row * plan.longest + place.clamp(max=plan.longest - 1),
        columns=plan.columns,
    )


def rows_of_tokens(offsets: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Return the row of each of T packed tokens and its place in the row, both ``[T]`` int64.

    Tokens of no row get the last row, and places beyond its end.
    """
    token = torch.arange(tokens, device=offsets.device)
    row = torch.searchsorted(offsets[1:].long(), token, right=True).clamp(max=offsets.shape[0] - 2)
    return row, token - offsets[:-1].long()[row]
