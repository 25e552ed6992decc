"""Sums of embeddings by the vector kernels: against float64, wrong arguments, and bits that do not depend on others."""

from __future__ import annotations

import pytest
import torch

from earlyexit_kernels.backends import extension_function
from earlyexit_kernels.cpu.kernels import kernels_unsupported_reason

EPS = 1e-12
pytestmark = pytest.mark.skipif(
    bool(kernels_unsupported_reason(torch.float32)), reason="the processor has no vector kernels"
)


def case(width, count=4):
    """Return tokens, tables and norm; values are large, so that their mean and variance lose digits if badly summed."""
    tables = [3 + torch.randn(size, width) for size in (50, 20, 2)]
    return [torch.randint(0, len(t), (1, count)) for t in tables], tables, [torch.randn(width), torch.randn(width)]


def embedding(tables, norm):
    return extension_function("Embedding")(*tables, *norm, EPS)


def assert_close(got, tokens, tables, norm):
    total = sum(table.double()[index] for table, index in zip(tables, tokens, strict=True) if table is not None)
    expected = torch.nn.functional.layer_norm(total, total.shape[-1:], *(x.double() for x in norm), EPS)
    torch.testing.assert_close(got.double(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("width", [1, 3, 128, 384, 768, 1000, 4096])
def test_equals_float64(width):
    """From tokens that need not be contiguous, and from weights that are read in place."""
    tokens, (words, positions, types), norm = case(width)
    strided = [x.repeat_interleave(2, dim=1)[:, ::2] for x in tokens]
    for tables in ([words, positions, types], [words, None, types], [words, None, None]):
        run = embedding(tables, norm)
        for scale in (1.0, 1.5):
            words.mul_(scale), norm[0].mul_(scale)
            assert_close(run(*tokens), tokens, tables, norm)
        assert torch.equal(run(*strided), run(*tokens))
        assert run(*(x[:, :0] for x in tokens)).shape == (1, 0, width)


def test_wrong_arguments_are_refused():
    tokens, tables, norm = case(8)
    good, make = (*tables, *norm, EPS), extension_function("Embedding")
    bad = {0: tables[0].double(), 1: tables[1][:, :4], 2: tables[2].T, 3: norm[0][:4], 4: norm[1].double()}
    for place, value in bad.items():
        with pytest.raises(ValueError, match=r"^Embedding: expected"):
            make(*good[:place], value, *good[place + 1 :])
    run = make(*good)
    for wrong in (tokens[0].int(), tokens[0][:, :3]):
        with pytest.raises(ValueError, match=r"^Embedding: expected int64 indices of [34] tokens for"):
            run(wrong, *tokens[1:])
    for row, (name, size) in enumerate((("words", 50), ("positions", 20), ("types", 2))):
        for index in (-1, size, 2**40):
            wrong = [x.clone() for x in tokens]
            wrong[row][0, 3] = index
            with pytest.raises(ValueError, match=rf"expected indices of {name} in \[0, {size - 1}\], got {index}"):
                run(*wrong)


@pytest.mark.parametrize("width", [33, 384])
def test_a_token_has_the_same_bits_beside_any_tokens_and_with_any_number_of_threads(width, thread_counts):
    tokens, tables, norm = case(width, 150)
    missing = tokens[0][0, 70].item()
    tables[0][missing] = torch.nan
    run = embedding(tables, norm)
    alone = torch.cat([run(*(x[:, i : i + 1] for x in tokens)) for i in range(150)], dim=1)
    assert torch.equal(alone.isnan().any(dim=2), tokens[0] == missing)
    for _ in thread_counts:
        torch.testing.assert_close(run(*tokens), alone, atol=0, rtol=0, equal_nan=True)
