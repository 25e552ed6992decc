"""The tensors of an op, declared once: their shapes in letters, their dtypes, and which of them the op writes.

The checks of calls and the op's schema follow from a declaration, and in the tests the table of
docs/extending_ops.md and random calls.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FLOAT32 = (torch.float32,)
INT32 = (torch.int32,)
INT64 = (torch.int64,)
#: Dtypes of ops that only copy.
COPIED = (*FLOATS, torch.float64)

#: Decorator of the checks: they read values and addresses, which a graph of torch.compile cannot hold. The op itself
#: stays in the graph.
not_traced = torch.compiler.disable


@dataclasses.dataclass(frozen=True)
class Argument:
    """A tensor argument.

    Attributes:
        shape: sizes, as ``"T, H"`` or ``"B + 1"``; a letter is the same number in all arguments of a call.
        dtypes: the supported dtypes, or the name of an earlier argument, which has the same dtype.
        written: whether the op writes it. Then it has to be contiguous and to share no memory with another argument.
        optional: whether it may be None.
    """

    shape: str
    dtypes: tuple[torch.dtype, ...] | str
    written: bool = False
    optional: bool = False
    #: Letter and the number added to it, for each size.
    sizes: tuple[tuple[str, int], ...] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        terms = [size.partition(" + ") for size in self.shape.split(", ")]
        object.__setattr__(self, "sizes", tuple((letter, int(more or 0)) for letter, _, more in terms))


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The tensor arguments of an op.

    Attributes:
        arguments: by name, in the order of the op's schema, whose first arguments they are.
    """

    arguments: Mapping[str, Argument]

    def schema(self) -> list[str]:
        """Return each argument in the language of torch's schemas, with a letter for each that is written."""
        marks = iter("(a!) (b!) (c!) (d!)".split())
        return [
            f"Tensor{next(marks) if argument.written else ''}{'?' if argument.optional else ''} {name}"
            for name, argument in self.arguments.items()
        ]

    def check(
        self,
        op: str,
        given: Mapping[str, Any],
        *,
        sizes: Mapping[str, int] | None = None,
        names: Iterable[str] | None = None,
    ) -> dict[str, int]:
        """Check that arguments are dense tensors of the declared shapes and dtypes on one device.

        Args:
            op: for the message.
            given: argument -> what a caller gave.
            sizes: the letters that are known. The first argument that has another one decides what it stands for.
            names: the arguments to check, in this order. Default: all of them.

        Returns:
            The number that each letter stands for.

        Raises:
            TypeError: not a tensor.
            ValueError: a tensor that the op does not support.
        """
        known, first = dict(sizes or {}), ""
        for name in self.arguments if names is None else names:
            argument, tensor = self.arguments[name], given[name]
            if tensor is None and argument.optional:
                continue
            device = given[first].device if first else None
            _check_kind(op, name, tensor, device)
            _check_sizes(op, name, tensor, argument, known)
            dtypes = argument.dtypes
            if isinstance(dtypes, str):
                dtypes = (given[dtypes].dtype,)
            if tensor.dtype not in dtypes:
                raise ValueError(f"{op}: expected {name} to be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
            if argument.written and not tensor.is_contiguous():
                raise ValueError(
                    f"{op}: expected {name}, which is written, to be contiguous, got strides {tensor.stride()}"
                )
            if device is not None and tensor.device != device:
                raise ValueError(f"{op}: {name} is on {tensor.device}, the rest on {device}; use one device")
            first = first or name
        return known

    def ready(self, op: str, given: Mapping[str, Tensor | None]) -> dict[str, Any]:
        """Return the checked arguments for the op: those that it reads contiguous, none in the memory that it writes.

        Raises:
            ValueError: a written tensor shares memory with another one.
        """
        ready = {
            name: x if (x := given[name]) is None or argument.written else x.contiguous()
            for name, argument in self.arguments.items()
        }
        written: list[tuple[int, int, str]] = []
        for name in sorted(ready, key=lambda name: not self.arguments[name].written):
            tensor = ready[name]
            if tensor is None or not tensor.numel():
                continue
            start = tensor.data_ptr()
            end = start + tensor.numel() * tensor.element_size()
            for other_start, other_end, other in written:
                if start < other_end and other_start < end:
                    raise ValueError(f"{op}: expected {other} to share no memory with {name}; pass a second buffer")
            if self.arguments[name].written:
                written.append((start, end, name))
        return ready


def _check_kind(op: str, name: str, tensor: Any, device: torch.device | None) -> None:
    """Raise unless `tensor` is a dense tensor with values, or on another `device`, which has a message of its own."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: expected {name} to be a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise ValueError(f"{op}: expected {name} to be a dense tensor, got {tensor.layout}; call .to_dense() on it")
    if tensor.is_meta and (device is None or device.type == "meta"):
        raise ValueError(f"{op}: expected {name} with values, got a meta tensor; move it to a device")


def _check_sizes(op: str, name: str, tensor: Tensor, argument: Argument, known: dict[str, int]) -> None:
    """Raise unless `tensor` has the declared shape; add the letters that it decides to `known`."""
    got = tensor.shape
    if len(got) == len(argument.sizes):
        for size, (letter, more) in zip(got, argument.sizes, strict=True):
            if size >= more:
                known.setdefault(letter, size - more)
        if list(got) == [known[letter] + more if letter in known else None for letter, more in argument.sizes]:
            return
    wanted = [
        str(known[letter] + more) if letter in known else f"{letter} + {more}" if more else letter
        for letter, more in argument.sizes
    ]
    raise ValueError(f"{op}: expected {name} of shape [{', '.join(wanted)}], got {list(got)}")
