"""The ops of an encoder layer behind one function each, which lays rows out in poisoned buffers and calls it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from earlyexit_kernels import ops

#: What untouched memory holds, in every dtype.
UNTOUCHED = 768.0
H, N, EPS = 24, 40, 1e-5


@dataclass(frozen=True)
class Layout:
    """Rows in buffers of two sides.

    Attributes:
        lengths: tokens of each row that owns some.
        left: those of them that have left.
        rows, capacity: R and T.
        side: which one is live.
    """

    lengths: tuple[int, ...]
    left: tuple[int, ...] = ()
    rows: int = 5
    capacity: int = 40
    side: int = 0

    @property
    def offsets(self) -> Tensor:
        lengths = torch.tensor([0, *self.lengths, *[0] * (self.rows - len(self.lengths))])
        return (lengths.cumsum(0) + self.side * self.capacity).to(torch.int32)

    @property
    def row_ids(self) -> Tensor:
        """In an order of their own."""
        ids = [2 * self.rows - i if i in self.live else -1 for i in range(self.rows)]
        return torch.tensor(ids, dtype=torch.int32)

    @property
    def live(self) -> list[int]:
        return [i for i in range(len(self.lengths)) if i not in self.left]

    def tokens(self, row: int, *, absolute: bool) -> slice:
        start = sum(self.lengths[:row]) + (self.side * self.capacity if absolute else 0)
        return slice(start, start + self.lengths[row])

    def buffer(self, values: Sequence[Tensor], width: int, dtype: torch.dtype, *, absolute: bool) -> Tensor:
        """``[T, width]``, or both sides of it: the rows' values where they belong, NaN everywhere else."""
        buffer = torch.full(((1 + absolute) * self.capacity, width), torch.nan, dtype=dtype)
        for row, value in enumerate(values):
            buffer[self.tokens(row, absolute=absolute)] = value.to(dtype)
        return buffer


def values_of(layout: Layout) -> list[Tensor]:
    """Of each row; those of a row depend on its length alone."""
    return [torch.randn(n, 3 * H, generator=torch.Generator().manual_seed(n)) for n in layout.lengths]


def parameters(*shape: int, dtype: torch.dtype) -> list[Tensor]:
    """A weight of this shape and a bias."""
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(s, generator=generator) * 0.3).to(dtype) for s in (shape, shape[:1])]


TORCH_ACTIVATIONS = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "tanh": torch.tanh,
}


def run_linear(layout, values, dtype, backend, how) -> Tensor:
    x = layout.buffer([v[:, :H] for v in values], H, dtype, absolute=how.get("absolute", False))
    out = torch.full((layout.capacity, N), UNTOUCHED, dtype=dtype)
    ops.rows_linear(x, *parameters(N, H, dtype=dtype), layout.offsets, out, backend=backend, **how)
    return out


def true_linear(values, how, dtype) -> Tensor:
    weight, bias = (p.double() for p in parameters(N, H, dtype=dtype))
    return TORCH_ACTIVATIONS[how.get("activation", "none")](F.linear(values[:, :H], weight, bias))


def run_first_tokens(layout, values, dtype, backend, how) -> Tensor:
    hidden = layout.buffer([v[:, :H] for v in values], H, dtype, absolute=True)
    out = torch.full((layout.rows, N), UNTOUCHED, dtype=dtype)
    factors = hidden, *parameters(N, H, dtype=dtype)
    ops.first_tokens_linear(*factors, layout.offsets, layout.row_ids, out, backend=backend, **how)
    return out


def true_first_tokens(values, how, dtype) -> Tensor:
    return true_linear(values[:1], how, dtype)


def run_attention(layout, values, dtype, backend, how) -> Tensor:
    heads, width = how["heads"], how["heads"] * how["size"]
    qkv = layout.buffer([v[:, : 3 * width] for v in values], 3 * width, dtype, absolute=False)
    out = torch.full((layout.capacity, width), UNTOUCHED, dtype=dtype)
    longest = how.get("longest", max(layout.lengths, default=0))
    ops.rows_attention(qkv, layout.offsets, layout.row_ids, heads, longest, out, backend=backend)
    return out


def true_attention(values, how, dtype) -> Tensor:
    heads, size = how["heads"], how["size"]
    q, k, v = values[:, : 3 * heads * size].view(len(values), 3, heads, size).permute(1, 2, 0, 3)
    return (q @ k.mT / size**0.5).softmax(-1).matmul(v).transpose(0, 1).flatten(1)


def run_add_norm(layout, values, dtype, backend, how) -> Tensor:
    x = layout.buffer([v[:, :H] for v in values], H, dtype, absolute=False)
    of_residual, of_out = how.get("residual_absolute", False), how.get("out_absolute", False)
    residual = layout.buffer([v[:, H : 2 * H] for v in values], H, dtype, absolute=of_residual)
    out = torch.full(((1 + of_out) * layout.capacity, H), UNTOUCHED, dtype=dtype)
    ops.rows_add_norm(x, residual, *parameters(H, dtype=dtype), EPS, layout.offsets, out, backend=backend, **how)
    return out


def true_add_norm(values, how, dtype) -> Tensor:
    weight, bias = (p.double() for p in parameters(H, dtype=dtype))
    return F.layer_norm(values[:, :H] + values[:, H : 2 * H], (H,), weight, bias, EPS)


@dataclass(frozen=True)
class Subject:
    """An op behind one function.

    Attributes:
        run: ``(layout, the rows' values, dtype, backend, how) -> out``, which was `UNTOUCHED`.
        truth: ``(a row's values, how, dtype of the parameters) -> its result``.
        ways: what `how` can be.
        tokens: a row's result is a line for each token, not one in all.
        writes_left: rows that have left, but own tokens, are computed with the rest.
    """

    run: Callable[..., Tensor]
    truth: Callable[..., Tensor]
    ways: tuple[dict[str, Any], ...]
    tokens: bool = True
    writes_left: bool = True

    def place(self, layout: Layout, row: int, how: dict[str, Any]) -> slice:
        """Where the result of a row is in out."""
        if not self.tokens:
            return slice(row, row + 1)
        return layout.tokens(row, absolute=how.get("out_absolute", False))


SUBJECTS = {
    "rows_linear": Subject(
        run_linear,
        true_linear,
        (
            {},
            {"activation": "gelu", "absolute": True},
            {"activation": "gelu_tanh"},
            {"activation": "relu", "absolute": True},
            {"activation": "tanh"},
        ),
    ),
    "first_tokens_linear": Subject(
        run_first_tokens, true_first_tokens, ({}, {"activation": "tanh"}), tokens=False, writes_left=False
    ),
    "rows_attention": Subject(
        run_attention,
        true_attention,
        ({"heads": 1, "size": 20, "longest": 80}, {"heads": 3, "size": 8}),
        writes_left=False,
    ),
    "rows_add_norm": Subject(
        run_add_norm,
        true_add_norm,
        ({}, {"residual_absolute": True, "out_absolute": True}, {"residual_absolute": True}, {"out_absolute": True}),
    ),
}
#: An op and how it is called, by a readable name.
WAYS = {
    "-".join([name, *map(str, how), *(v for v in how.values() if isinstance(v, str))]): (subject, how)
    for name, subject in SUBJECTS.items()
    for how in subject.ways
}
