"""first_tokens_linear on the CPU against float64: sizes, dtypes, and bits that do not depend on the other rows."""

from __future__ import annotations

import pytest
import torch
from support.backends import backend_params

from earlyexit_kernels.ops import raw
from earlyexit_kernels.ops.first_tokens_linear import ACTIVATIONS

#: H, outputs: multiples of the vectors, none of them, and single values.
SIZES = ((64, 64), (384, 100), (7, 3), (33, 17), (1, 1), (16, 130))
TOLERANCE = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
compiled = pytest.mark.parametrize("backend", backend_params(["cpp"]))


def batch(rows, width, dtype=torch.float32, seed=0):
    """Return hidden states of rows of 2 tokens, with NaN in every token that is not the first, and their offsets."""
    hidden = torch.randn(4 * rows, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
    hidden[1::2] = torch.nan
    return hidden, torch.arange(0, 2 * rows + 1, 2, dtype=torch.int32)


def parameters(outputs, width, dtype=torch.float32, seed=1):
    g = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(outputs, width, generator=g) * width**-0.5, torch.randn(outputs, generator=g)
    return weight.to(dtype), bias.to(dtype)


def run(hidden, weight, bias, offsets, row_ids=None, activation="tanh", backend="cpp"):
    row_ids = torch.arange(len(offsets) - 1, dtype=torch.int32) if row_ids is None else row_ids
    out = torch.full((len(row_ids), len(weight)), 7.0, dtype=hidden.dtype)
    raw("first_tokens_linear", backend, "cpu")(hidden, weight, bias, offsets, row_ids, out, activation)
    return out


@compiled
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", SIZES)
def test_equals_float64(size, activation, dtype, backend):
    for rows in (1, 2, 5, 9):
        (hidden, offsets), (weight, bias) = batch(rows, size[0], dtype), parameters(size[1], size[0], dtype)
        want = ACTIVATIONS[activation](hidden[: 2 * rows : 2].double() @ weight.double().T + bias.double())
        got = run(hidden, weight, bias, offsets, activation=activation)
        torch.testing.assert_close(got.double(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("backend", backend_params(["torch", "cpp"]))
def test_only_present_rows_are_written(backend):
    (hidden, offsets), (weight, bias) = batch(3, 8), parameters(3, 8)
    out = run(hidden, weight, bias, offsets, torch.tensor([0, -1, 1], dtype=torch.int32), backend=backend)
    want = (hidden[:6:2] @ weight.T + bias).tanh()
    torch.testing.assert_close(out, torch.stack([want[0], torch.full((3,), 7.0), want[2]]))


@compiled
@pytest.mark.parametrize("size", [(384, 100), (33, 17)])
def test_a_row_has_the_same_bits_beside_any_rows_and_with_any_number_of_threads(size, backend, thread_counts):
    rows = 33
    (hidden, offsets), (weight, bias) = batch(rows, size[0]), parameters(size[1], size[0])
    alone = torch.cat([run(hidden, weight, bias, offsets[i : i + 2]) for i in range(rows)])
    left = torch.arange(rows, dtype=torch.int32)
    left[::3] = -1
    for _ in thread_counts:
        assert torch.equal(run(hidden, weight, bias, offsets), alone)
        some = run(hidden, weight, bias, offsets, left)
        assert torch.equal(some[left >= 0], alone[left >= 0]) and (some[left < 0] == 7).all()


@compiled
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_stays_in_its_row(value, backend):
    (hidden, offsets), (weight, bias) = batch(6, 33), parameters(17, 33)
    before = run(hidden, weight, bias, offsets, activation="none")
    hidden[6, 32] = value
    after = run(hidden, weight, bias, offsets, activation="none")
    want = hidden[6].double() @ weight.double().T + bias.double()
    torch.testing.assert_close(after[3].double(), want, equal_nan=True)
    others = [0, 1, 2, 4, 5]
    assert torch.equal(after[others], before[others])


@compiled
def test_tanh_over_its_range(backend):
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([1e-20, -1e-4, 88.0, -200.0])])
    x = torch.cat([x, x])[:, None].contiguous()
    offsets = torch.arange(len(x) // 2 + 1, dtype=torch.int32)
    got = run(x, torch.ones(1, 1), torch.zeros(1), offsets)[:, 0].double()
    torch.testing.assert_close(got, x[: len(got), 0].double().tanh(), atol=0, rtol=6e-7)
    special = torch.tensor([torch.nan, torch.inf, -torch.inf])[:, None].repeat(2, 1)
    got = run(special, torch.ones(1, 1), torch.zeros(1), torch.arange(4, dtype=torch.int32))[:, 0]
    torch.testing.assert_close(got, torch.tensor([torch.nan, 1.0, -1.0]), equal_nan=True)


@compiled
def test_wrong_arguments_are_refused_by_the_kernel(backend):
    (hidden, offsets), (weight, bias) = batch(2, 8), parameters(3, 8)
    ids, out = torch.arange(2, dtype=torch.int32), torch.zeros(2, 3)
    op = torch.ops.earlyexit_kernels.first_tokens_linear_cpp
    good = hidden, weight, bias, offsets, ids, out, "tanh"
    op(*good)
    bad = {0: hidden.double(), 1: weight[:, :4], 2: bias[:2], 3: offsets[:2], 4: ids.long(), 5: out[:1], 6: "silu"}
    for place, value in bad.items():
        with pytest.raises(ValueError, match="first_tokens_linear_cpp: expected"):
            op(*good[:place], value, *good[place + 1 :])
    with pytest.raises(ValueError, match="first token of row 1 among the 8 tokens, got 8"):
        op(hidden, weight, bias, torch.tensor([0, 8, 9], dtype=torch.int32), ids, out, "tanh")
