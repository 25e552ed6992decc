"""The ops' input checks: what was expected, what came, what to do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FLOAT32 = (torch.float32,)
INT32 = (torch.int32,)
INT64 = (torch.int64,)


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
