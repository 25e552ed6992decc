"""Random changes to the arguments of an op; `validity` decides whether the result is still valid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fuzz.case import Case

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
)
#: Whole numbers at the edges of int32.
EDGES = (-(2**31), -(2**31) + 1, -5, -2, -1, 0, 1, 2, 7, 2**20, 2**30, 2**31 - 2, 2**31 - 1)
#: Values of other types than tensors.
OBJECTS = (
    None,
    0,
    -1,
    1.5,
    float("nan"),
    "first",
    "max",
    [],
    [0, 1],
    (),
    {},
    True,
    b"x",
    object(),
    2**31,
    2**63,
    2**70,
)


def change(case: Case, arguments: dict[str, Any]) -> str:
    """Change up to three arguments in place; return a description of the changes."""
    changes = []
    for _ in range(case.choice((0, 1, 1, 1, 1, 2, 2, 3))):
        names = [name for name, value in arguments.items() if isinstance(value, Tensor)]
        others = [name for name in arguments if name not in names]
        if not names or (others and case.chance(0.15)):
            name = case.choice(list(arguments))
            arguments[name] = value = case.choice(OBJECTS)
            changes.append(f"{name} = {type(value).__name__} {str(value)[:20]}")
            continue
        name = case.choice(names)
        kind = case.choice(list(MUTATIONS))
        changed = MUTATIONS[kind](case, arguments[name], arguments)
        if changed is not None:
            arguments[name] = changed
            changes.append(f"{name} {kind}")
    return ", ".join(changes) or "nothing changed"


def _dense(tensor: Tensor) -> bool:
    """Return whether the tensor is a dense CPU tensor with at least one dimension."""
    return tensor.dim() > 0 and tensor.layout == torch.strided and tensor.device.type == "cpu"


def _other_size(case: Case, tensor: Tensor, _: Any) -> Tensor | None:
    if not _dense(tensor):
        return None
    dim = case.integer(0, tensor.dim() - 1)
    size = case.choice((0, max(0, tensor.shape[dim] - 1), tensor.shape[dim] + 1, 2 * tensor.shape[dim]))
    shape = [*tensor.shape]
    shape[dim] = size
    new = torch.zeros(shape, dtype=tensor.dtype)
    kept = min(size, tensor.shape[dim])
    new.narrow(dim, 0, kept).copy_(tensor.narrow(dim, 0, kept))
    return new


def _other_dims(case: Case, tensor: Tensor, _: Any) -> Tensor | None:
    if tensor.layout != torch.strided:
        return None
    return case.choice((tensor[None], tensor[..., None], tensor.reshape(-1)))


def _other_dtype(case: Case, tensor: Tensor, _: Any) -> Tensor | None:
    if tensor.is_complex():
        return None
    return tensor.to(case.choice([d for d in DTYPES if d != tensor.dtype]))


def _strided(case: Case, tensor: Tensor, _: Any) -> Tensor | None:
    if not _dense(tensor):
        return None
    wide = torch.zeros(*tensor.shape, 2, dtype=tensor.dtype)
    wide[..., 0] = tensor
    flipped = tensor.transpose(0, -1).contiguous().transpose(0, -1)
    return case.choice((wide[..., 0], flipped, tensor[:1].expand(tensor.shape) if len(tensor) else flipped))


def _inside(case: Case, tensor: Tensor, _: Any) -> Tensor | None:
    """Return a view into the middle of a larger buffer, whose other elements must not change."""
    if not _dense(tensor):
        return None
    buffer = torch.zeros(tensor.numel() + 5, dtype=tensor.dtype)
    view = buffer[3 : 3 + tensor.numel()].view(tensor.shape)
    view.copy_(tensor)
    return view


def _number(case: Case, tensor: Tensor, _: Any) -> Tensor | None:
    """Set one element to an edge value: near or at the limits for integers, NaN, infinite or 0 otherwise."""
    if not _dense(tensor) or not tensor.numel():
        return None
    new = tensor.clone(memory_format=torch.contiguous_format)
    flat = new.view(-1)
    at = case.integer(0, len(flat) - 1)
    if new.is_floating_point() or new.is_complex():
        flat[at] = case.choice((float("nan"), float("inf"), -float("inf"), 0.0))
    elif new.dtype != torch.bool:
        near = int(flat[at]) + case.choice((-1, 1, 2))
        value = case.choice((near, case.choice(EDGES)))
        limits = torch.iinfo(new.dtype)
        flat[at] = min(max(value, limits.min), limits.max)
    return new


def _all_numbers(case: Case, tensor: Tensor, _: Any) -> Tensor | None:
    """Return random integers: repeated, unordered or out of range."""
    if not _dense(tensor) or tensor.dtype != torch.int32 or not tensor.numel():
        return None
    low, high = case.choice(((-2, len(tensor) + 1), (0, max(1, len(tensor) - 1)), (-(2**31), 2**31 - 1)))
    values = [case.integer(low, high) for _ in range(tensor.numel())]
    if case.chance(0.4):
        values.sort()
    return torch.tensor(values, dtype=torch.int32).view(tensor.shape)


def _wrapping(case: Case, tensor: Tensor, _: Any) -> Tensor | None:
    """Return offsets whose differences overflow int32."""
    if not _dense(tensor) or tensor.dtype != torch.int32 or tensor.dim() != 1 or len(tensor) < 2:
        return None
    new = tensor.clone()
    at = case.integer(1, len(new) - 1)
    new[at:] = case.choice((2**31 - 1, 2**30))
    if at + 1 < len(new):
        new[at + 1 :] = case.choice((-(2**31), -(2**31) + 5, 2**31 - 1))
    return new


def _repeated(case: Case, tensor: Tensor, _: Any) -> Tensor | None:
    if not _dense(tensor) or len(tensor) < 2:
        return None
    new = tensor.clone(memory_format=torch.contiguous_format)
    a, b = case.draw.sample(range(len(new)), 2)
    new[a] = new[b]
    return new


def _aliased(case: Case, tensor: Tensor, arguments: dict[str, Any]) -> Tensor | None:
    """Return a view of the memory of another argument, if dtypes and sizes allow."""
    if not _dense(tensor) or not tensor.numel():
        return None
    size = tensor.numel() * tensor.element_size()
    for name in case.draw.sample(sorted(arguments), len(arguments)):
        other = arguments[name]
        if not isinstance(other, Tensor) or other is tensor or not _dense(other) or not other.is_contiguous():
            continue
        # a tensor of one element may have any stride, but a view as bytes requires a stride of 1
        flat = other.as_strided((other.numel(),), (1,)).view(torch.uint8)
        if len(flat) >= size and flat.storage_offset() % tensor.element_size() == 0:
            return flat[:size].view(tensor.dtype).view(tensor.shape)
    return None


def _foreign(case: Case, tensor: Tensor, _: Any) -> Any:
    """Return the values as something other than a dense CPU tensor."""
    kind = case.choice(("meta", "numpy", "list", "sparse"))
    if not _dense(tensor):
        return None
    if kind == "meta":
        return tensor.to("meta")
    if kind == "sparse":
        return tensor.to_sparse()
    if tensor.dtype == torch.bfloat16:
        return None
    return tensor.tolist() if kind == "list" else tensor.numpy()


MUTATIONS: dict[str, Callable[[Case, Tensor, dict[str, Any]], Any]] = {
    "of another size": _other_size,
    "of other dimensions": _other_dims,
    "of another dtype": _other_dtype,
    "strided": _strided,
    "inside of a buffer": _inside,
    "with another number": _number,
    "with other numbers": _all_numbers,
    "wrapping": _wrapping,
    "with a repeated entry": _repeated,
    "aliased": _aliased,
    "foreign": _foreign,
}
