"""Sizes of the buffers of captured layers."""

from __future__ import annotations

import pytest

from earlyexit_kernels.cuda.levels import MAX_TOKENS, level_size


@pytest.mark.parametrize("padded", [False, True])
def test_level_holds_the_batch_and_few_sizes_hold_all(padded):
    sizes = set()
    for rows in (1, 2, 3, 8, 31, 32, 33, 200):
        for length in (1, 7, 30, 128, 129, 500):
            for tokens in {rows, rows * length, (rows * length + rows) // 2}:
                size = level_size(rows, tokens, length, padded=padded)
                if size is None:
                    assert tokens > MAX_TOKENS
                    continue
                assert size.tokens >= tokens and size.rows >= rows and size.longest >= length
                assert size.tokens <= max(64, 1.5 * tokens, 16 * rows * 1.5)
                if padded:
                    assert size.rows < 2 * rows and size.longest < length + 64
                sizes.add(size)
    assert len(sizes) < (40 if not padded else 90)


def test_batches_that_are_too_large_have_no_level():
    assert level_size(512, MAX_TOKENS, 128, padded=False).tokens == MAX_TOKENS
    assert level_size(513, MAX_TOKENS + 1, 128, padded=False) is None
    assert level_size(513, MAX_TOKENS + 1, 128, padded=True) is None
