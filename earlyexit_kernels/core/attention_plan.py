"""Plans of attention: which tokens form a row, in which groups rows are attended, and which tokens attend to which.

`plan_attention` makes the plan of a packed batch, once for each batch and compaction; `attention` follows it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from earlyexit_kernels.core.length_buckets import LengthBucket, LengthBuckets, group_by_length, once
from earlyexit_kernels.core.packing import PackedBatch, rows_of_tokens


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
class AttentionPlan:
    """How the rows of a packed batch are attended: in buckets, or in one call if the lengths are on the device.

    Attributes:
        grouped: returns the rows in buckets, made when a layer first asks for them; the vector kernels do not.
        offsets, longest: arguments of the variable-length kernel; no row is longer than `longest`.
        ends: ``[R + 1]`` int32 offsets of the rows on the CPU.
        columns: ``[T]`` column of each token in its padded row, or None if that is its place in the row, up to a
            constant.
        masks: of the buckets, by kind; filled when a layer first asks for one.
        rectangles: plans of `rectangle`, by the number of tokens.
    """

    grouped: Callable[[], LengthBuckets] = LengthBuckets
    offsets: Tensor | None = None
    longest: int = 0
    ends: Tensor | None = None
    columns: Tensor | None = None
    masks: dict[AttentionKind, list[Tensor | None]] = field(default_factory=dict, compare=False)
    rectangles: dict[int, AttentionPlan] = field(default_factory=dict, compare=False)

    @property
    def buckets(self) -> tuple[LengthBucket, ...]:
        """Rectangles of rows of similar length."""
        return self.grouped().buckets

    def join(self, rectangles: Sequence[Tensor]) -> Tensor:
        """Return the packed tokens ``[T, ...]`` of a rectangle ``[rows, width, ...]`` for each bucket."""
        return self.grouped().join(rectangles)

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
    """Plan the attention of a batch: once per batch and compaction, not per layer.

    Args:
        batch: the rows.
        columns: ``[T]`` of their tokens, if these are needed and not the places in the rows.
    """
    lengths, device = batch.lengths, batch.offsets.device
    if lengths is None:
        return AttentionPlan(offsets=batch.offsets, longest=batch.longest, columns=columns)
    return AttentionPlan(once(lambda: group_by_length(lengths, device)), ends=batch.offsets, columns=columns)


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
    bucket = LengthBucket(len(starts), plan.longest, slots.flatten(), (column <= last)[:, None, None, :])
    buckets = LengthBuckets((bucket,), inverse=row * plan.longest + place.clamp(max=plan.longest - 1))
    return AttentionPlan(lambda: buckets, columns=plan.columns)
