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
    lengths = offsets.diff()
    end = int(offsets[-1])
    if int(offsets[0]) < 0 or int(lengths.min()) < 0 or (tokens is not None and end > tokens):
        raise ValueError(
            f"{op}: expected offsets that never decrease, from 0 or above to at most {tokens} tokens, got "
            f"{int(offsets[0])} to {end} with steps down to {int(lengths.min())}; pass cumulative lengths"
        )
    if pools and bool(((row_ids >= 0) & (lengths == 0)).any()):
        raise ValueError(f"{op}: expected a token in every row present, got an empty one; set its row id to -1")


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
