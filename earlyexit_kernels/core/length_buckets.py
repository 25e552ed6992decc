"""Rows of similar length together, as rectangles, for attention that does not read packed rows in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

#: Rows share a bucket if the longest has at most this many tokens, or this factor, more than the shortest.
BUCKET_SLACK_TOKENS = 8
BUCKET_SLACK_FACTOR = 1.25

Made = TypeVar("Made")


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
class LengthBuckets:
    """All rows of a batch in buckets.

    Attributes:
        buckets: rectangles of rows of similar length.
        inverse: ``[T]`` position of each packed token among the tokens of the buckets, or None if they are in order.
    """

    buckets: tuple[LengthBucket, ...] = ()
    inverse: Tensor | None = None

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Rows, widths, slots, masks and kept of the buckets, and `inverse`: arguments of `cpu.bert.OneDnnLayer`."""
        names = ("rows", "width", "slots", "mask", "kept")
        return *([getattr(bucket, name) for bucket in self.buckets] for name in names), self.inverse

    def join(self, rectangles: Sequence[Tensor]) -> Tensor:
        """Return the packed tokens ``[T, ...]`` of a rectangle ``[rows, width, ...]`` for each bucket."""
        flat = (x.flatten(0, 1) for x in rectangles)
        parts = [
            x if bucket.kept is None else x.index_select(0, bucket.kept)
            for bucket, x in zip(self.buckets, flat, strict=True)
        ]
        return parts[0] if self.inverse is None else torch.cat(parts).index_select(0, self.inverse)


def once(make: Callable[[], Made]) -> Callable[[], Made]:
    """Return a function that returns what `make` returned at its first call.

    Threads that ask at the same time may call `make` more than once, and get the same result. There is no lock, which a
    process forked meanwhile would find taken.
    """
    made: list[Made] = []

    def get() -> Made:
        if not made:
            made.append(make())
        return made[0]

    return get


def group_by_length(lengths: Sequence[int], device: torch.device) -> LengthBuckets:
    """Return packed rows of these lengths in buckets, with their indices on a device."""
    if min(lengths) == max(lengths):
        return LengthBuckets((LengthBucket(len(lengths), lengths[0]),))
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
    return LengthBuckets(tuple(buckets), torch.from_numpy(inverse).to(device))


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
