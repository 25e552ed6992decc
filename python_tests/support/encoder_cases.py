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
#: Lines before the rows in the tensors that are indexed by `starts`.
AHEAD = 3


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

    @property
    def starts(self) -> Tensor:
        """First token of each row id, in an order in which rows lie backwards; `AHEAD` lines precede them."""
        starts = torch.zeros(2 * self.rows + 1)
        for row in self.live:
            starts[2 * self.rows - row] = AHEAD + sum(self.lengths[row + 1 :])
        return starts.to(torch.int32)

    def in_first_order(self, of_place: Callable[[Tensor], Tensor]) -> Tensor:
        """Return a function of the place in its row for every token, in the order of `starts`, and NaN elsewhere."""
        rows = [of_place(torch.arange(n)) for n in reversed(self.lengths)]
        empty = of_place(torch.arange(AHEAD)) * 0 + (torch.nan if of_place(torch.zeros(1)).is_floating_point() else 0)
        return torch.cat([empty, *rows, empty])

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
    longest, near = how.get("longest", max(layout.lengths, default=0)), {}
    if "window" in how:
        near = {"window": how["window"], "columns": layout.in_first_order(columns_of), "starts": layout.starts}
    ops.rows_attention(qkv, layout.offsets, layout.row_ids, heads, longest, out, **near, backend=backend)
    return out


def columns_of(place: Tensor) -> Tensor:
    """Columns of tokens behind a hole."""
    return place.long() + 4 * (place >= 3)


def true_attention(values, how, dtype) -> Tensor:
    heads, size = how["heads"], how["size"]
    q, k, v = values[:, : 3 * heads * size].view(len(values), 3, heads, size).permute(1, 2, 0, 3)
    scores, columns = q @ k.mT / size**0.5, columns_of(torch.arange(len(values)))
    if "window" in how:
        scores = scores.masked_fill((columns[:, None] - columns).abs() >= how["window"], -torch.inf)
    return scores.softmax(-1).matmul(v).transpose(0, 1).flatten(1)


def angles_of(size: int, dtype: torch.dtype) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Return cosine and sine of the place of a token in its row."""
    angles = 10.0 ** -torch.linspace(0, 2, size // 2).repeat(2)
    return tuple(lambda place, f=f: f(place[:, None] * angles).to(dtype) for f in (torch.cos, torch.sin))


def run_rotary(layout, values, dtype, backend, how) -> Tensor:
    heads, size = how["heads"], how["size"]
    qkv = layout.buffer([v[:, : 3 * heads * size] for v in values], 3 * heads * size, dtype, absolute=False)
    before, longest = qkv.clone(), how.get("longest", max(layout.lengths, default=0))
    tables = [layout.in_first_order(each) for each in angles_of(size, dtype)]
    ops.rows_rotary(qkv, *tables, layout.starts, layout.offsets, layout.row_ids, heads, longest, backend=backend)
    others = torch.ones(len(qkv), dtype=torch.bool)
    for row in layout.live:
        others[layout.tokens(row, absolute=False)] = False
    assert torch.equal(qkv[others].nan_to_num(UNTOUCHED), before[others].nan_to_num(UNTOUCHED))
    qkv[others] = UNTOUCHED
    return qkv


def true_rotary(values, how, dtype) -> Tensor:
    heads, size = how["heads"], how["size"]
    qkv = values[:, : 3 * heads * size].view(len(values), 3 * heads, size)
    cos, sin = (each(torch.arange(len(values))).double()[:, None] for each in angles_of(size, dtype))
    low, high = qkv.chunk(2, dim=2)
    turned = qkv * cos + torch.cat((-high, low), dim=2) * sin
    return torch.cat((turned[:, : 2 * heads], qkv[:, 2 * heads :]), dim=1).flatten(1)


def run_mean(layout, values, dtype, backend, how) -> Tensor:
    width = how["columns"]
    hidden = layout.buffer([v[:, :width] for v in values], width, dtype, absolute=True)
    out = torch.full((layout.rows, width), UNTOUCHED, dtype=dtype)
    ops.rows_mean(hidden, layout.offsets, layout.row_ids, out, backend=backend)
    return out


def true_mean(values, how, dtype) -> Tensor:
    return values[:, : how["columns"]].mean(dim=0, keepdim=True)


def run_glu(layout, values, dtype, backend, how) -> Tensor:
    x = layout.buffer([v[:, : 2 * H] for v in values], 2 * H, dtype, absolute=False)
    out = torch.full((layout.capacity, H), UNTOUCHED, dtype=dtype)
    ops.rows_glu(x, layout.offsets, out, backend=backend, **how)
    return out


def true_glu(values, how, dtype) -> Tensor:
    return TORCH_ACTIVATIONS[how["activation"]](values[:, :H]) * values[:, H : 2 * H]


def run_add_norm(layout, values, dtype, backend, how) -> Tensor:
    x = layout.buffer([v[:, :H] for v in values], H, dtype, absolute=False)
    of_residual, of_out = how.get("residual_absolute", False), how.get("out_absolute", False)
    residual = layout.buffer([v[:, H : 2 * H] for v in values], H, dtype, absolute=of_residual)
    out = torch.full(((1 + of_out) * layout.capacity, H), UNTOUCHED, dtype=dtype)
    given = {name: value for name, value in how.items() if name.endswith("absolute")}
    if how.get("adds") == "nothing":
        x = None
    if how.get("total") == "in place":
        given["total"], before = residual, residual.clone()
    norm = *parameters(H, dtype=dtype), EPS
    ops.rows_add_norm(x, residual, *norm, layout.offsets, out, backend=backend, **given)
    if "total" in given:
        for row in range(len(layout.lengths)):
            place = layout.tokens(row, absolute=of_residual)
            before[place] += x[layout.tokens(row, absolute=False)]  # type: ignore[index]
        assert torch.equal(residual.nan_to_num(UNTOUCHED), before.nan_to_num(UNTOUCHED))
    return out


def true_add_norm(values, how, dtype) -> Tensor:
    weight, bias = (p.double() for p in parameters(H, dtype=dtype))
    total = values[:, H : 2 * H] + (0 if how.get("adds") == "nothing" else values[:, :H])
    if "total" in how:
        total = total.to(dtype).double()
    return F.layer_norm(total, (H,), weight, bias, EPS)


#: Sizes of the tables of words, positions and types; the first has one more word, of NaN.
TABLES = (16, 8, 2)


def indices_of(values) -> Tensor:
    """Return word, position and type of each token ``[3, n]`` by the signs of its values; NaN is the last word."""
    bits = (values[:, :8] > 0).long()
    words, positions, types = (bits[:, a:b] @ 2 ** torch.arange(b - a) for a, b in ((0, 4), (4, 7), (7, 8)))
    return torch.stack((words.masked_fill(values[:, 0].isnan(), TABLES[0]), positions, types))


def tables_of(dtype, how) -> list[Tensor | None]:
    """Return the tables of words, positions and types."""
    words, positions, types = (parameters(size, H, dtype=dtype)[0] for size in TABLES)
    words = torch.cat((words, torch.full_like(words[:1], torch.nan)))
    without = how.get("without", "")
    return [words, None if "positions" in without else positions, None if "types" in without else types]


def run_embed(layout, values, dtype, backend, how) -> Tensor:
    tokens = torch.full((4, layout.capacity), 10**6)
    for row, value in enumerate(values):
        tokens[:3, layout.tokens(row, absolute=False)] = indices_of(value)
    out = torch.full((layout.capacity, H), UNTOUCHED, dtype=dtype)
    norm = *parameters(H, dtype=dtype), EPS
    ops.rows_embed(tokens, *tables_of(dtype, how), *norm, layout.offsets, out, backend=backend)
    return out


def true_embed(values, how, dtype) -> Tensor:
    weight, bias = (p.double() for p in parameters(H, dtype=dtype))
    found = zip(tables_of(dtype, how), indices_of(values), strict=True)
    total = sum(table.double()[index] for table, index in found if table is not None)
    return F.layer_norm(total, (H,), weight, bias, EPS)


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
        (
            {"heads": 1, "size": 20, "longest": 80},
            {"heads": 3, "size": 8},
            {"heads": 3, "size": 8, "window": 9},
            {"heads": 1, "size": 20, "window": 1},
        ),
        writes_left=False,
    ),
    "rows_rotary": Subject(
        run_rotary,
        true_rotary,
        ({"heads": 1, "size": 20, "longest": 80}, {"heads": 3, "size": 8}),
        writes_left=False,
    ),
    "rows_mean": Subject(run_mean, true_mean, ({"columns": 72}, {"columns": H}), tokens=False, writes_left=False),
    "rows_glu": Subject(run_glu, true_glu, ({"activation": "gelu"}, {"activation": "relu"})),
    "rows_embed": Subject(
        run_embed, true_embed, ({}, {"without": "types"}, {"without": "positions"}, {"without": "positions and types"})
    ),
    "rows_add_norm": Subject(
        run_add_norm,
        true_add_norm,
        (
            {},
            {"residual_absolute": True, "out_absolute": True},
            {"residual_absolute": True},
            {"out_absolute": True},
            {"residual_absolute": True, "total": "in place"},
            {"total": "in place", "out_absolute": True},
            {"residual_absolute": True, "adds": "nothing"},
        ),
    ),
}
#: Readable name -> op and keyword arguments.
WAYS = {
    "-".join([name, *map(str, how), *(v for v in how.values() if isinstance(v, str))]): (subject, how)
    for name, subject in SUBJECTS.items()
    for how in subject.ways
}
