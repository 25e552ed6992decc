"""One function per op of an encoder layer, which writes rows into buffers filled with NaN and calls the op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from earlyexit_kernels import ops

#: Initial value of output buffers, exact in every dtype.
UNTOUCHED = 768.0
H, N, EPS = 24, 40, 1e-5


@dataclass(frozen=True)
class Layout:
    """Rows in buffers of two sides.

    Attributes:
        lengths: number of tokens of each row that has some.
        left: indices of those rows that have left.
        rows, capacity: R and T.
        side: the side in use, 0 or 1.
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
        """Row ids, in descending order."""
        ids = [2 * self.rows - i if i in self.live else -1 for i in range(self.rows)]
        return torch.tensor(ids, dtype=torch.int32)

    @property
    def live(self) -> list[int]:
        return [i for i in range(len(self.lengths)) if i not in self.left]

    def tokens(self, row: int, *, absolute: bool) -> slice:
        start = sum(self.lengths[:row]) + (self.side * self.capacity if absolute else 0)
        return slice(start, start + self.lengths[row])

    def buffer(self, values: Sequence[Tensor], width: int, dtype: torch.dtype, *, absolute: bool) -> Tensor:
        """Return a buffer ``[T, width]``, or ``[2 T, width]``, with the values of the rows and NaN elsewhere."""
        buffer = torch.full(((1 + absolute) * self.capacity, width), torch.nan, dtype=dtype)
        for row, value in enumerate(values):
            buffer[self.tokens(row, absolute=absolute)] = value.to(dtype)
        return buffer


def values_of(layout: Layout) -> list[Tensor]:
    """Return random values of each row, which depend on its length only."""
    return [torch.randn(n, 3 * H, generator=torch.Generator().manual_seed(n)) for n in layout.lengths]


def parameters(*shape: int, dtype: torch.dtype) -> list[Tensor]:
    """Return a weight of this shape and a bias."""
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
    """An op to test.

    Attributes:
        run: ``(layout, values of the rows, dtype, backend, how) -> out``, initially `UNTOUCHED`.
        truth: ``(values of a row, how, dtype of the parameters) -> its result``.
        ways: values of `how`, the keyword arguments of the op.
        tokens: whether the result of a row has one line per token, or one line in total.
        writes_left: whether rows that have left but still have tokens are computed.
    """

    run: Callable[..., Tensor]
    truth: Callable[..., Tensor]
    ways: tuple[dict[str, Any], ...]
    tokens: bool = True
    writes_left: bool = True

    def place(self, layout: Layout, row: int, how: dict[str, Any]) -> slice:
        """Return the slice of the output with the result of a row."""
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
#: Readable name -> op and keyword arguments.
WAYS = {
    "-".join([name, *map(str, how), *(v for v in how.values() if isinstance(v, str))]): (subject, how)
    for name, subject in SUBJECTS.items()
    for how in subject.ways
}
