"""Input checks of the ops. Each message says what was expected, what was given and what to do."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FLOAT32 = (torch.float32,)
INT32 = (torch.int32,)
INT64 = (torch.int64,)
#: Dtypes of ops that only copy.
COPIED = (*FLOATS, torch.float64)
MAX_INT32 = torch.iinfo(torch.int32).max

#: Decorator of the checks: they read values and addresses, which a graph of torch.compile cannot hold. The op itself
#: stays in the graph.
not_traced = torch.compiler.disable


def check_row_ids(op: str, row_ids: Tensor, *, requests: int | None) -> None:
    """Raise ValueError if row ids on the CPU repeat, or exceed the number of requests.

    Like all checks of values this one is for the CPU only; on CUDA it would synchronise with the device.

    Args:
        op: for the message.
        row_ids: ``[B]``; negative for rows that have left.
        requests: N, or None for any number.
    """
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
    """Raise ValueError if offsets ``[B + 1]`` on the CPU are empty, decrease or exceed the number of tokens.

    Args:
        op, name: for the message.
        offsets: int32.
        tokens: size of the buffer, or None for any.
    """
    if not offsets.numel():
        raise ValueError(f"{op}: expected {name} of shape [R + 1], got [0]; for no rows pass one offset")
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
    """Raise ValueError if a present row on the CPU has no token."""
    ends = offsets.numpy()
    if ((row_ids.numpy() >= 0) & (ends[1:] == ends[:-1])).any():
        raise ValueError(
            f"{op}: expected at least one token in every present row, got an empty row; set its row id to -1"
        )


def check_moves(op: str, offsets: Tensor, source: Tensor, new_offsets: Tensor) -> None:
    """Raise ValueError if a row of `source` on the CPU does not exist or changes its length.

    Args:
        op: for the message.
        offsets: ``[B + 1]``, non-decreasing.
        source: ``[B2]``; negative for no row.
        new_offsets: ``[B2 + 1]``, non-decreasing.
    """
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


def check_apart(op: str, written: Mapping[str, Tensor | None], read: Mapping[str, Tensor | None]) -> None:
    """Raise ValueError if a written tensor shares memory with another tensor of the call.

    Args:
        op: for the message.
        written, read: name -> contiguous tensor, or None if it is not given.
    """
    spans: list[tuple[int, int, str]] = []
    for k, (name, tensor) in enumerate((*written.items(), *read.items())):
        if tensor is None or not tensor.numel():
            continue
        start = tensor.data_ptr()
        end = start + tensor.numel() * tensor.element_size()
        for other_start, other_end, other in spans:
            if start < other_end and other_start < end:
                raise ValueError(f"{op}: expected {other} to share no memory with {name}; pass a second buffer")
        if k < len(written):
            spans.append((start, end, name))


def check_row_count(op: str, rows: int) -> None:
    """Raise ValueError if int32 cannot count the rows."""
    if rows > MAX_INT32:
        raise ValueError(f"{op}: expected at most {MAX_INT32} rows, got {rows}; split the batch")


def check_whole(op: str, **arguments: Any) -> None:
    """Raise TypeError if an argument is not a whole number, ValueError if int32 cannot hold it."""
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{op}: expected {name} to be a whole number, got {value!r}")
        if abs(int(value)) > MAX_INT32:
            raise ValueError(f"{op}: expected {name} to be at most {MAX_INT32} in magnitude, got {value}")


def check_tensor(
    op: str,
    name: str,
    tensor: Any,
    shape: Sequence[int | None],
    dtypes: Sequence[torch.dtype],
    *,
    written: bool = False,
    device: torch.device | None = None,
) -> None:
    """Raise TypeError or ValueError if an argument is not a tensor that `op` supports.

    Args:
        op, name: for the message.
        tensor: the argument.
        shape: sizes, None for any.
        dtypes: supported dtypes.
        written: whether the op writes the tensor, which then must be contiguous.
        device: of the op's other tensors, or None for any.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: expected {name} to be a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise ValueError(f"{op}: expected {name} to be a dense tensor, got {tensor.layout}; call .to_dense() on it")
    if tensor.is_meta and (device is None or device.type == "meta"):
        raise ValueError(f"{op}: expected {name} with values, got a meta tensor; move it to a device")
    got = tensor.shape
    if len(got) != len(shape) or any(want not in (None, have) for want, have in zip(shape, got, strict=True)):
        wanted = ["*" if size is None else size for size in shape]
        raise ValueError(f"{op}: expected {name} of shape {wanted}, got {list(got)}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{op}: expected {name} to be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if written and not tensor.is_contiguous():
        raise ValueError(f"{op}: expected {name}, which is written, to be contiguous, got strides {tensor.stride()}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, the rest on {device}; use one device")
