"""rows_embed beside the modules of torch, indices that no table has, and bits that do not depend on other tokens."""

from __future__ import annotations

import pytest
import torch
from support.backends import backend_params
from support.capability import run_tests_of, with_fewer_instructions

from earlyexit_kernels import ops

EPS = 1e-12
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
on_all = pytest.mark.parametrize("backend", backend_params(("torch", "triton", "cpp")))
not_compiled = pytest.mark.parametrize("backend", backend_params(("torch", "triton")))
compiled = pytest.mark.parametrize("backend", backend_params(["cpp"]))


def embedded(tokens, tables, norm, backend) -> torch.Tensor:
    """Embed all tokens ``[4, T]`` without the checks of the public function, into a buffer of NaN."""
    count, (_, width) = tokens.shape[1], tables[0].shape
    offsets, out = torch.tensor([3, 3 + count], dtype=torch.int32), tables[0].new_full((count, width), torch.nan)
    ops.bare_op("rows_embed", backend, "cpu")(tokens, *tables, *norm, EPS, offsets, out)
    return out


def case(width, count=4, dtype=torch.float32):
    """Return tokens, tables and norm; values are large, so that their mean and variance lose digits if badly summed."""
    tables = [(3 + torch.randn(size, width)).to(dtype) for size in (50, 20, 2)]
    indices = [torch.randint(0, len(t), (count,)) for t in tables]
    norm = torch.randn(width).to(dtype), torch.randn(width).to(dtype)
    return torch.stack((*indices, torch.full((count,), -7))), tables, norm


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [1, 3, 128, 384, 768, 1000, 4096])
@on_all
def test_equals_float64(backend, width, dtype):
    tokens, tables, norm = case(width, dtype=dtype)
    out = embedded(tokens, tables, norm, backend)
    total = sum(table.double()[index] for table, index in zip(tables, tokens[:3], strict=True))
    want = torch.nn.functional.layer_norm(total, (width,), *(x.double() for x in norm), EPS)
    torch.testing.assert_close(out.double(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("index", [-1, -(2**40), 2, 2**40])
@pytest.mark.parametrize("table", [0, 1, 2])
@not_compiled
def test_a_token_that_a_table_does_not_have_is_nan(backend, table, index):
    """As on a GPU, where reading the indices would synchronise; other tokens do not notice."""
    tokens, tables, norm = torch.zeros(4, 3).long(), [torch.randn(2, 24) for _ in range(3)], torch.randn(2, 24)
    clean = embedded(tokens, tables, norm, backend)
    tokens[table, 1] = index
    out = embedded(tokens, tables, norm, backend)
    assert out[1].isnan().all() and not clean.isnan().any() and torch.equal(out[::2], clean[::2])
    tokens[:] = index
    tokens[0], tables[1], tables[2] = 0, None, None
    assert not embedded(tokens, tables, norm, backend).isnan().any(), "tables that are not there are not read"


@compiled
def test_wrong_arguments_of_the_bare_op_are_refused(backend):
    tokens, (words, positions, types), (weight, bias) = case(8)
    offsets, out = torch.tensor([0, 4], dtype=torch.int32), torch.zeros(4, 8)
    op = torch.ops.earlyexit_kernels.rows_embed_cpp
    good = tokens, words, positions, types, weight, bias, EPS, offsets, out
    op(*good)
    bad = {0: tokens.int(), 1: words.double(), 2: positions[:, :4], 3: types.T, 4: weight[:4], 5: bias.double()}
    bad |= {7: offsets.long(), 8: out[:2]}
    with pytest.raises(ValueError, match=r"rows_embed_cpp: expected offsets \[R \+ 1\], got an empty tensor"):
        op(*good[:7], offsets[:0], out)
    for place, value in bad.items():
        with pytest.raises(ValueError, match="rows_embed_cpp: expected"):
            op(*good[:place], value, *good[place + 1 :])
    with pytest.raises(ValueError, match="rows_embed_cpp: expected at most 4 present tokens, got 5"):
        op(*good[:7], torch.tensor([2, 7], dtype=torch.int32), out)
    for row, (name, size) in enumerate((("words", 50), ("positions", 20), ("types", 2))):
        for index in (-1, size, 2**40):
            wrong = tokens.clone()
            wrong[row, 3] = index
            with pytest.raises(ValueError, match=rf"expected indices of {name} in \[0, {size - 1}\], got {index}"):
                op(wrong, *good[1:])


@compiled
@pytest.mark.parametrize("width", [33, 384])
def test_a_token_has_the_same_bits_beside_any_tokens_and_with_any_number_of_threads(width, backend):
    threads, (tokens, tables, norm) = torch.get_num_threads(), case(width, 150)
    tables[0][tokens[0, 70]] = torch.nan
    alone = torch.cat([embedded(tokens[:, i : i + 1].contiguous(), tables, norm, backend) for i in range(150)])
    assert torch.equal(alone.isnan().any(dim=1), tokens[0] == tokens[0, 70])
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            together = embedded(tokens, tables, norm, backend)
            assert torch.equal(together.nan_to_num(), alone.nan_to_num())
            assert torch.equal(together.isnan(), alone.isnan())
    finally:
        torch.set_num_threads(threads)


@pytest.mark.thorough
@compiled
@with_fewer_instructions
def test_other_kernels_of_this_processor(capability, backend):
    """The tests above with fewer instructions, and without vector kernels."""
    run_tests_of(__file__, capability)
