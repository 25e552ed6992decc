"""Products in parts of K: the same bits whether the parts are added in the product or in the norm after it."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.backends import backend_params

from earlyexit_kernels import ops
from earlyexit_kernels.backends import TRITON_INTERPRETED
from earlyexit_kernels.ops.rows_linear_tma import TMA_TILES, rows_linear_tma
from earlyexit_kernels.ops.tiles import SUM_PARTS, TILES, few_tiles, part_terms

FLOAT32, HALF = torch.float32, torch.float16
#: Columns, and terms of a sum: parts of which one is empty and one is short in half precision, and of which two are
#: empty in both dtypes, behind whole ones.
N, K, SHORT = 40, 300, {FLOAT32: 32, HALF: 128}
#: Tokens for which the parts are computed side by side, and for which they are not.
FEW, MANY = 90, 33792
EPS = 1e-5
TOLERANCE = {FLOAT32: 2e-6, HALF: 2e-3}

on_both = pytest.mark.parametrize("backend", backend_params(("torch", "triton")))
in_both_dtypes = pytest.mark.parametrize("dtype", [FLOAT32, HALF], ids=str)
interpreted = pytest.mark.skipif(not TRITON_INTERPRETED, reason="runs in Triton's interpreter, as TRITON_INTERPRET=1")


def weights(dtype, *shapes) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [(0.3 * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes]


def values(length, width) -> torch.Tensor:
    """Random values of a row, which depend on its length only."""
    return torch.randn(length, width, generator=torch.Generator().manual_seed(length))


def norm_of_product(lengths, capacity, dtype, backend, *, split, k=K) -> list[torch.Tensor]:
    """Return each row's ``layer_norm(x W^T + b + residual)``; all bytes of no row are NaN, also between."""
    x, residual, out = (torch.full((capacity, width), torch.nan, dtype=dtype) for width in (k, N, N))
    middle = torch.full((SUM_PARTS, capacity, N), torch.nan) if split else torch.full_like(out, torch.nan)
    ends = [0, *itertools.accumulate(lengths)]
    places = [slice(*pair) for pair in itertools.pairwise(ends)]
    for length, place in zip(lengths, places, strict=True):
        x[place], residual[place] = values(length, k + N).to(dtype).split([k, N], dim=1)
    offsets = torch.tensor(ends, dtype=torch.int32)
    weight, bias, scale, shift = weights(dtype, (N, k), (N,), (N,), (N,))
    ops.rows_linear(x, weight, bias, offsets, middle, in_parts=True, backend=backend)
    x_bias = bias if split else None
    ops.rows_add_norm(middle, residual, scale, shift, EPS, offsets, out, x_bias=x_bias, backend=backend)
    assert out[ends[-1] :].isnan().all() and middle[..., ends[-1] :, :].isnan().all(), "tokens that are not present"
    return [out[place] for place in places]


@pytest.mark.sample(4)
@in_both_dtypes
@on_both
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("k", [1, SHORT, K])
def test_equals_float64(k, split, backend, dtype):
    k = k if isinstance(k, int) else k[dtype]
    weight, bias, scale, shift = (each.double() for each in weights(dtype, (N, k), (N,), (N,), (N,)))
    lengths = (5, 3, 70, 1)
    for length, got in zip(lengths, norm_of_product(lengths, FEW, dtype, backend, split=split, k=k), strict=True):
        x, residual = values(length, k + N).to(dtype).double().split([k, N], dim=1)
        y = x @ weight.T + bias + residual
        want = torch.nn.functional.layer_norm(y, (N,), scale, shift, EPS)
        torch.testing.assert_close(got.double(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.sample(4)
@pytest.mark.triton
@interpreted
@in_both_dtypes
@pytest.mark.parametrize("k", [SHORT, K])
def test_bits_are_equal_in_every_capacity_beside_any_rows(k, dtype, products_in_order):
    """Small buffers sum the parts in the norm, large ones in large tiles."""
    k = k if isinstance(k, int) else k[dtype]
    assert few_tiles(dtype, FEW, N) and not few_tiles(dtype, MANY, N)
    seen: dict[int, list[torch.Tensor]] = {}
    companies = [((5,), 5), ((70,), 70), ((1,), 1), ((5, 70, 1), FEW), ((1, 9, 5, 70), MANY)]
    for lengths, capacity in companies:
        split = few_tiles(dtype, capacity, N)
        found = norm_of_product(lengths, capacity, dtype, "triton", split=split, k=k)
        for length, got in zip(lengths, found, strict=True):
            seen.setdefault(length, []).append(got)
    for length in (1, 5, 70):
        first, *others = seen[length]
        assert len(others) == 2 and not first.isnan().any() and all(torch.equal(first, other) for other in others)


@pytest.mark.triton
@interpreted
def test_order_of_the_parts_decides_bits(products_in_order):
    """Otherwise the test above could not fail: a sum over all of K, or in another order, has other bits."""
    x, weight = values(70, K), weights(FLOAT32, (N, K))[0]
    offsets, zero = torch.tensor([0, 70], dtype=torch.int32), torch.zeros(N)
    whole, in_parts = torch.empty(70, N), torch.empty(70, N)
    parts = torch.empty(SUM_PARTS, 70, N)
    ops.rows_linear(x, weight, zero, offsets, whole, backend="triton")
    ops.rows_linear(x, weight, zero, offsets, in_parts, in_parts=True, backend="triton")
    ops.rows_linear(x, weight, zero, offsets, parts, in_parts=True, backend="triton")
    assert torch.equal(((parts[0] + parts[1]) + parts[2]) + parts[3], in_parts)
    assert not torch.equal(whole, in_parts)
    assert not torch.equal(((parts[3] + parts[2]) + parts[1]) + parts[0], in_parts)


@pytest.mark.triton
@interpreted
@pytest.mark.parametrize(("present", "capacity"), [(1, 130), (129, 300)])
@pytest.mark.parametrize("k", [K - K % 8, 768])
def test_bulk_copies_have_the_bits_of_the_parts(k, present, capacity, products_in_order):
    x = torch.full((capacity, k), torch.nan, dtype=HALF)
    x[:present] = values(present, k).to(HALF)
    weight, bias = weights(HALF, (N, k), (N,))
    offsets, out = torch.tensor([0, present], dtype=torch.int32), torch.full((capacity, N), torch.nan, dtype=HALF)
    rows_linear_tma(x, weight, bias, offsets, out, "none", False, True, TMA_TILES[-1])
    parts = torch.full((SUM_PARTS, capacity, N), torch.nan)
    ops.rows_linear(x, weight, bias, offsets, parts, in_parts=True, backend="triton")
    want = (parts[0] + parts[1] + parts[2] + parts[3] + bias.float()).to(HALF)
    assert torch.equal(out[:present], want[:present]) and not out[:present].isnan().any()
    assert out[present:].isnan().all()


@pytest.mark.parametrize("dtype", [HALF, FLOAT32])
@pytest.mark.parametrize("k", [1, 16, 64, 65, 300, 768, 3072, 5000])
def test_parts_are_whole_steps_of_all_tiles_and_hold_all_terms(k, dtype):
    part = part_terms(k, dtype)
    assert k <= SUM_PARTS * part < k + SUM_PARTS * TILES[dtype.itemsize][0].depth + part
    assert all(part % tiles.depth == 0 for tiles in (*TILES[dtype.itemsize], *(TMA_TILES if dtype == HALF else ())))


#: Changed arguments of a product in parts -> words of the message.
REFUSED = {
    "two weights": ({"weight": [torch.zeros(N, K)] * 2, "bias": [torch.zeros(N)] * 2}, ("one weight", "got 2")),
    "an activation": ({"activation": "gelu"}, ("no activation", "'gelu'")),
    "not in parts": ({"in_parts": False}, ("out", "['*', '*']", "got [4, 6, 40]")),
    "three parts": ({"out": torch.zeros(3, 6, N)}, ("out", "[4, '*', '*']", "got [3, 6, 40]")),
    "half parts": ({"out": torch.zeros(SUM_PARTS, 6, N).half()}, ("out", "torch.float32", "got torch.float16")),
    "fewer tokens": ({"x": torch.zeros(5, K)}, ("x", "[6, '*']", "got [5, 300]")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_linear_refuses(case):
    changed, words = REFUSED[case]
    given = {"x": torch.zeros(6, K), "weight": torch.zeros(N, K), "bias": torch.zeros(N), "in_parts": True}
    given |= {"offsets": torch.tensor([0, 2], dtype=torch.int32), "out": torch.zeros(SUM_PARTS, 6, N)}
    with pytest.raises(ValueError, match=r"^rows_linear: ") as caught:
        ops.rows_linear(**{**given, **changed})
    assert all(word in str(caught.value) for word in words), str(caught.value)


#: Changed arguments of a norm of parts -> words of the message.
NORM_REFUSED = {
    "no bias": ({"x_bias": None}, ("x", "['*', '*']", "got [4, 6, 40]")),
    "width of the bias": ({"x_bias": torch.zeros(N + 1)}, ("x_bias", "[40]", "got [41]")),
    "dtype of the bias": ({"x_bias": torch.zeros(N).half()}, ("x_bias", "torch.float32", "got torch.float16")),
    "whole product": ({"x": torch.zeros(6, N)}, ("x", "[4, '*', '*']", "got [6, 40]")),
    "half parts": ({"x": torch.zeros(SUM_PARTS, 6, N).half()}, ("x", "torch.float32", "got torch.float16")),
}


def norm_arguments() -> dict:
    vectors = {name: torch.zeros(N) for name in ("weight", "bias", "x_bias")}
    tensors = {"x": torch.zeros(SUM_PARTS, 6, N), "residual": torch.zeros(6, N), "out": torch.zeros(6, N)}
    return {**vectors, **tensors, "eps": EPS, "offsets": torch.tensor([0, 2], dtype=torch.int32)}


@pytest.mark.parametrize("case", NORM_REFUSED)
def test_norm_refuses(case):
    changed, words = NORM_REFUSED[case]
    with pytest.raises(ValueError, match=r"^rows_add_norm: ") as caught:
        ops.rows_add_norm(**{**norm_arguments(), **changed})
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_norm_does_not_write_over_its_parts():
    given = norm_arguments()
    given["out"] = given["x"][0]
    with pytest.raises(ValueError, match="expected out to share no memory with x"):
        ops.rows_add_norm(**given)
