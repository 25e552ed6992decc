"""What kernels do where few tokens of the capacity are present: less work, with the same bits."""

from __future__ import annotations

import importlib

import pytest
import torch
from support.encoder_cases import SUBJECTS, UNTOUCHED, Layout, values_of

from earlyexit_kernels.backends import TRITON_INTERPRETED, tensor_descriptor
from earlyexit_kernels.ops.rows_linear_tma import FIRST_COLUMNS, TMA_TILES, rows_linear_tma

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(not TRITON_INTERPRETED, reason="runs in Triton's interpreter, as TRITON_INTERPRET=1"),
]

HALF = torch.float16
#: Columns that three tiles of the first sums cover, and terms: four parts, of which the last is short.
N, K, CAPACITY = 264, 768 + 40, 300
#: Tiles of two bodies.
NARROWED = TMA_TILES[-1]


def product(present: int, in_parts: bool) -> torch.Tensor:
    """Return the product of the first tokens of a buffer, in which all others are NaN."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator).to(HALF) for shape in ((CAPACITY, K), (N, K), (N,)))
    x[present:] = torch.nan
    offsets, out = torch.tensor([0, present], dtype=torch.int32), torch.full((CAPACITY, N), torch.nan, dtype=HALF)
    rows_linear_tma(x, weight, bias, offsets, out, "none" if in_parts else "gelu", False, in_parts, NARROWED)
    assert out[present:].isnan().all() and not out[:present, :FIRST_COLUMNS].isnan().any()
    return out[:present]


@pytest.fixture
def no_second_weight(monkeypatch):
    """Let the kernel read NaN where it computes the second sums of wide tiles."""

    def descriptor(x, block):
        poisoned = x.shape == (N, K) and block[0] == NARROWED.columns - FIRST_COLUMNS
        return tensor_descriptor(torch.full_like(x, torch.nan) if poisoned else x, block)

    monkeypatch.setattr("earlyexit_kernels.ops.rows_linear_tma.tensor_descriptor", descriptor)


@pytest.mark.parametrize(("present", "is_narrow"), [(1, True), (128, True), (129, False), (CAPACITY, False)])
def test_few_tokens_run_in_narrow_tiles(present, is_narrow, no_second_weight):
    """As many as there are programs. Narrow tiles have no second sums."""
    assert product(present, in_parts=False).isnan().any() != is_narrow


@pytest.mark.parametrize("in_parts", [False, True])
def test_narrow_tiles_have_the_bits_of_wide_ones(in_parts, products_in_order, monkeypatch):
    """The rows of 1 and 128 tokens run in narrow tiles, and in wide ones beside others or with fewer programs."""
    many = product(CAPACITY, in_parts)
    few = {present: product(present, in_parts) for present in (1, 128, 129)}
    monkeypatch.setattr(importlib.import_module("earlyexit_kernels.ops.tiles"), "INTERPRETED_PROCESSORS", 1)
    few_wide = product(128, in_parts)
    assert all(torch.equal(rows, many[: len(rows)]) for rows in (*few.values(), few_wide))


#: Ops whose programs loop, in all of their ways.
LOOPS = ("rows_add_norm", "rows_attention", "rows_glu", "rows_rotary")


@pytest.mark.sample(10)
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize(("name", "way"), [(name, way) for name in LOOPS for way in range(len(SUBJECTS[name].ways))])
def test_any_number_of_programs_gives_the_same_bits(name, way, dtype, products_in_order, monkeypatch):
    """One program for each block of the capacity, or a few that loop, also over blocks without tokens.

    The buffers hold NaN outside of the rows, and some rows have left.
    """
    module, subject = importlib.import_module(f"earlyexit_kernels.ops.{name}"), SUBJECTS[name]
    layout, asked, found = Layout((5, 3, 70, 1), left=(1,), capacity=90, side=1), [], []

    for programs in (10**6, 1, 2, 7):

        def of(items, resident, device, programs=programs):
            asked.append(items)
            return min(items, programs)

        monkeypatch.setattr(module, "looping_programs", of)
        found.append(subject.run(layout, values_of(layout), dtype, "triton", subject.ways[way]))
    assert len(asked) == 4 and min(asked) > 7
    for row in layout.live:
        assert not found[0][subject.place(layout, row, subject.ways[way])].isnan().any()
    assert all(torch.equal(found[0].nan_to_num(UNTOUCHED), other.nan_to_num(UNTOUCHED)) for other in found[1:])
