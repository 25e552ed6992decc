"""Random changes to the arguments of an op; `validity` decides whether the changed call is still valid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from support.random_settings import chance, choice
from torch import Tensor

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
)
#: Whole numbers at the edges of int32.
EDGES = (-1, 0, 1, 2, 7, -2, -5, -(2**31), -(2**31) + 1, 2**20, 2**30, 2**31 - 2, 2**31 - 1)
#: Values in place of an argument.
OBJECTS = (
    *(None, 0, -1, 1.5, float("nan"), "first", "max", [], [0, 1], (), {}, True, b"x", object()),
    *(2**31, 2**63, 2**70),
)
Arguments = dict[str, Any]


def change(draw: Any, arguments: Arguments) -> Arguments:
    """Return the arguments with up to three of them changed."""
    changed = dict(arguments)
    for _ in range(choice(draw, (1, 1, 1, 2, 2, 3, 0))):
        tensors = [name for name, value in changed.items() if isinstance(value, Tensor)]
        if not tensors or chance(draw, 15):
            others = sorted(set(changed) - set(tensors))
            name = choice(draw, others if others and chance(draw, 60) else sorted(changed))
            changed[name] = choice(draw, EDGES if isinstance(changed[name], int) and chance(draw, 60) else OBJECTS)
            continue
        name, kind = choice(draw, tensors), choice(draw, list(CHANGES))
        tensor = changed[name]
        if kind is foreign or (tensor.dim() and tensor.layout == torch.strided and tensor.device.type == "cpu"):
            changed[name] = kind(draw, tensor, changed)
    return changed


def other_size(draw: Any, tensor: Tensor, _: Arguments) -> Tensor:
    dim = draw(st.integers(0, tensor.dim() - 1))
    had = tensor.shape[dim]
    shape = list(tensor.shape)
    shape[dim] = choice(draw, (had + 1, max(0, had - 1), 0, 2 * had))
    new = torch.zeros(shape, dtype=tensor.dtype)
    kept = min(had, shape[dim])
    new.narrow(dim, 0, kept).copy_(tensor.narrow(dim, 0, kept))
    return new


def other_dims(draw: Any, tensor: Tensor, _: Arguments) -> Tensor:
    return choice(draw, (tensor[None], tensor[..., None], tensor.reshape(-1)))


def other_dtype(draw: Any, tensor: Tensor, _: Arguments) -> Tensor:
    return tensor if tensor.is_complex() else tensor.to(choice(draw, DTYPES))


def strided(draw: Any, tensor: Tensor, _: Arguments) -> Tensor:
    """Return the values with gaps, or transposed in memory, or those of the first row in every row."""
    wide = torch.zeros(*tensor.shape, 2, dtype=tensor.dtype)
    wide[..., 0] = tensor
    flipped = tensor.transpose(0, -1).contiguous().transpose(0, -1)
    return choice(draw, (wide[..., 0], flipped, tensor[:1].expand(tensor.shape) if len(tensor) else flipped))


def inside(draw: Any, tensor: Tensor, _: Arguments) -> Tensor:
    """Return a view into the middle of a larger buffer, whose other elements must not change."""
    buffer = torch.zeros(tensor.numel() + 5, dtype=tensor.dtype)
    view = buffer[3 : 3 + tensor.numel()].view(tensor.shape)
    view.copy_(tensor)
    return view


def number(draw: Any, tensor: Tensor, _: Arguments) -> Tensor:
    """Set one element to an edge value: near or at the limits for integers, NaN, infinite or 0 otherwise."""
    new = tensor.clone(memory_format=torch.contiguous_format)
    if not tensor.numel() or new.dtype == torch.bool:
        return new
    flat = new.view(-1)
    at = draw(st.integers(0, len(flat) - 1))
    if new.is_floating_point() or new.is_complex():
        flat[at] = choice(draw, (float("nan"), float("inf"), -float("inf"), 0.0))
    else:
        limits = torch.iinfo(new.dtype)
        near = int(flat[at]) + choice(draw, (1, -1, 2))
        flat[at] = min(max(choice(draw, (near, choice(draw, EDGES))), limits.min), limits.max)
    return new


def numbers(draw: Any, tensor: Tensor, _: Arguments) -> Tensor:
    """Return integers that repeat, are unordered or out of range, or whose differences overflow int32."""
    if tensor.dtype != torch.int32 or not tensor.numel():
        return tensor
    low, high = choice(draw, ((-2, len(tensor) + 1), (0, max(1, len(tensor) - 1)), (-(2**31), 2**31 - 1)))
    count = tensor.numel()
    values = draw(st.lists(st.integers(low, high) | st.sampled_from(EDGES), min_size=count, max_size=count))
    return torch.tensor(sorted(values) if chance(draw, 40) else values, dtype=torch.int32).view(tensor.shape)


def wrapping(draw: Any, tensor: Tensor, _: Arguments) -> Tensor:
    """Return offsets whose differences overflow int32."""
    if tensor.dtype != torch.int32 or tensor.dim() != 1 or len(tensor) < 2:
        return tensor
    new, at = tensor.clone(), draw(st.integers(1, len(tensor) - 1))
    new[at:] = choice(draw, (2**31 - 1, 2**30))
    new[at + 1 :] = choice(draw, (-(2**31), -(2**31) + 5, 2**31 - 1))
    return new


def repeated(draw: Any, tensor: Tensor, _: Arguments) -> Tensor:
    new = tensor.clone(memory_format=torch.contiguous_format)
    if len(new) > 1:
        a, b = draw(st.permutations(range(len(new))))[:2]
        new[a] = new[b]
    return new


def aliased(draw: Any, tensor: Tensor, arguments: Arguments) -> Tensor:
    """Return a view of the memory of another argument, if dtypes and sizes allow."""
    size = tensor.numel() * tensor.element_size()
    for name in draw(st.permutations(sorted(arguments))) if size else ():
        other = arguments[name]
        if not isinstance(other, Tensor) or other is tensor or not other.dim() or other.layout != torch.strided:
            continue
        if other.device.type != "cpu" or not other.is_contiguous():
            continue
        # a tensor of one element may have any stride, but a view as bytes requires a stride of 1
        flat = other.as_strided((other.numel(),), (1,)).view(torch.uint8)
        if len(flat) >= size and flat.storage_offset() % tensor.element_size() == 0:
            return flat[:size].view(tensor.dtype).view(tensor.shape)
    return tensor


def foreign(draw: Any, tensor: Tensor, _: Arguments) -> Any:
    """Return the values as something other than a dense tensor on the CPU."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return tensor
    kind = choice(draw, ("meta", "sparse", "list", "numpy"))
    if kind == "meta":
        return tensor.to("meta")
    if kind == "sparse":
        return tensor.to_sparse() if tensor.dim() else tensor
    return tensor.tolist() if kind == "list" or tensor.dtype == torch.bfloat16 else tensor.numpy()


CHANGES: tuple[Callable[[Any, Tensor, Arguments], Any], ...] = (
    *(other_size, other_dims, other_dtype, strided, inside, number, numbers, wrapping, repeated, aliased, foreign),
)
