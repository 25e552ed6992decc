"""Checks of the values of ids and offsets, on the CPU only: on CUDA they would synchronise with the device."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_INT32 = torch.iinfo(torch.int32).max


def check_row_ids(op: str, row_ids: Tensor, *, requests: int | None) -> None:
    """Raise ValueError if row ids repeat, or exceed the number of requests N; None is any number."""
    # numpy is several times as fast as torch on a few numbers
    ids = row_ids.numpy()
    present = ids[ids >= 0]
    if not present.size:
        return
    present.sort()
    if requests is not None and present[-1] >= requests:
        raise ValueError(f"{op}: expected row_ids below the {requests} rows of answers, got {present[-1]}")
    same = present[1:] == present[:-1]
    if same.any():
        raise ValueError(
            f"{op}: expected distinct row_ids, got {present[1:][same][0]} more than once; "
            "set the ids of rows that have left to -1"
        )


def check_offsets(op: str, offsets: Tensor, *, tokens: int | None, name: str = "offsets") -> None:
    """Raise ValueError if offsets decrease, or exceed the number of tokens in the buffer; None is any number."""
    ends = offsets.numpy()
    start, end = int(ends[0]), int(ends[-1])
    # compared and not subtracted: a difference of int32 can wrap
    if start < 0 or (tokens is not None and end > tokens) or (ends[1:] < ends[:-1]).any():
        limit = "" if tokens is None else f" to at most {tokens} tokens"
        step = min([0, *offsets.long().diff().tolist()])
        raise ValueError(
            f"{op}: expected non-decreasing {name} from 0 or above{limit}, got {start} to {end} with a minimum step of "
            f"{step}; pass cumulative lengths"
        )


def check_no_empty_row(op: str, row_ids: Tensor, offsets: Tensor) -> None:
    """Raise ValueError if a present row has no token."""
    ends = offsets.numpy()
    if ((row_ids.numpy() >= 0) & (ends[1:] == ends[:-1])).any():
        raise ValueError(
            f"{op}: expected at least one token in every present row, got an empty row; set its row id to -1"
        )


def check_moves(op: str, offsets: Tensor, source: Tensor, new_offsets: Tensor) -> None:
    """Raise ValueError if a row of `source` does not exist or changes its length; both offsets do not decrease."""
    ends, new_ends, rows = offsets.numpy(), new_offsets.numpy(), source.numpy()
    moved = rows >= 0
    index = rows[moved]
    if not index.size:
        return
    if index.max() >= ends.size - 1:
        raise ValueError(f"{op}: expected source below the {ends.size - 1} rows of offsets, got {index.max()}")
    had, has = (ends[1:] - ends[:-1])[index], (new_ends[1:] - new_ends[:-1])[moved]
    other = had != has
    if other.any():
        k = other.argmax()
        raise ValueError(
            f"{op}: expected new_offsets to keep the {had[k]} tokens of row {index[k]}, got {has[k]}; pass what "
            "compact returned"
        )


def check_row_count(op: str, rows: int) -> None:
    """Raise ValueError if int32 cannot count the rows."""
    if rows > MAX_INT32:
        raise ValueError(f"{op}: expected at most {MAX_INT32} rows, got {rows}; split the batch")
