"""The ops' input checks: what was expected, what came, what to do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FLOAT32 = (torch.float32,)
INT32 = (torch.int32,)
INT64 = (torch.int64,)


def check_rows(
    op: str, row_ids: Tensor, offsets: Tensor | None, *, requests: int, tokens: int | None, pools: bool
) -> None:
    """Raise ValueError where a row present lies outside of the request, or has no token to pool.

    For CPU tensors: looking costs a synchronisation elsewhere. The compiled op looks itself.

    Args:
        op: for the message.
        row_ids: ``[B]``.
        offsets: ``[B + 1]`` or None.
        requests: N.
        tokens: T, or None where the offsets belong to no buffer.
        pools: the op reads tokens through the offsets.
    """
    if not row_ids.numel():
        return
    if int(row_ids.max()) >= requests:
        raise ValueError(f"{op}: expected row_ids below the {requests} rows of answers, got {int(row_ids.max())}")
    if offsets is None:
        return
    check_offsets(op, offsets, tokens=tokens)
    if pools:
        check_no_empty_row(op, row_ids, offsets)


def check_offsets(op: str, offsets: Tensor, *, tokens: int | None) -> None:
    """Raise ValueError where offsets ``[B + 1]`` on the CPU, of one row or more, decrease or pass the last token.

    Args:
        op: for the message.
        offsets: int32.
        tokens: of the buffer, or None for any number.
    """
    start, end, step = int(offsets[0]), int(offsets[-1]), int(offsets.diff().min())
    if start < 0 or step < 0 or (tokens is not None and end > tokens):
        most = "" if tokens is None else f" to at most {tokens} tokens"
        raise ValueError(
            f"{op}: expected offsets that never decrease, from 0 or above{most}, got {start} to {end} with steps down "
            f"to {step}; pass cumulative lengths"
        )


def check_no_empty_row(op: str, row_ids: Tensor, offsets: Tensor) -> None:
    """Raise ValueError where a row present, on the CPU, has no token."""
    if bool(((row_ids >= 0) & (offsets.diff() == 0)).any()):
        raise ValueError(f"{op}: expected a token in every row present, got an empty one; set its row id to -1")


def check_present(op: str, offsets: Tensor, row_ids: Tensor | None, *, capacity: int, device: torch.device) -> None:
    """Raise ValueError where offsets ``[R + 1]`` don't say which tokens of two sides are present.

    Args:
        op: for the message.
        offsets: int32; their values are looked at on the CPU only.
        row_ids: ``[R]``, or None.
        capacity: T, tokens of a side.
        device: where the op's other tensors are.
    """
    rows = None
    if row_ids is not None:
        check_tensor(op, "row_ids", row_ids, (None,), INT32, device=device)
        rows = row_ids.shape[0] + 1
    check_tensor(op, "offsets", offsets, (rows,), INT32, device=device)
    if offsets.numel() == 0:
        raise ValueError(f"{op}: expected offsets of shape [R + 1], got [0]; for no rows pass one offset")
    if device.type != "cpu" or offsets.numel() == 1:
        return
    check_offsets(op, offsets, tokens=2 * capacity)
    present = int(offsets[-1]) - int(offsets[0])
    if present > capacity:
        raise ValueError(f"{op}: expected at most {capacity} tokens present, got {present}; take larger buffers")


def check_apart(op: str, name: str, tensor: Tensor, out: Tensor) -> None:
    """Raise ValueError where `out`, which is written, overlaps a tensor that is read; both are contiguous."""
    starts, sizes = zip(*((t.data_ptr(), t.numel() * t.element_size()) for t in (tensor, out)), strict=True)
    if all(sizes) and starts[0] < starts[1] + sizes[1] and starts[1] < starts[0] + sizes[0]:
        raise ValueError(f"{op}: expected out to share no memory with {name}; pass a second buffer")


def check_tensor(
    op: str,
    name: str,
    tensor: Tensor,
    shape: Sequence[int | None],
    dtypes: Sequence[torch.dtype],
    *,
    written: bool = False,
    device: torch.device | None = None,
) -> None:
    """Raise ValueError where `tensor` isn't what `op` takes.

    Args:
        op, name: for the message.
        shape: sizes, None for any.
        dtypes: allowed.
        written: the op writes into it, so it has to be contiguous itself.
        device: where the op's other tensors are.
    """
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
