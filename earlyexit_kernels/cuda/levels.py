"""Sizes of the buffers that captured layers run on."""

from __future__ import annotations

from typing import NamedTuple

#: Tokens of the largest level; larger batches run eagerly.
MAX_TOKENS = 65_536
MIN_TOKENS, MIN_ROWS = 64, 8
#: A level has room for one row for so many tokens, unless its rows would be more blocks of attention than this.
TOKENS_PER_ROW, MAX_BLOCKS = 16, 4096
#: Tokens of a row that one block attends to; blocks of rows that are not there end at once, but are launched.
BLOCK = 128
#: Longest rows of levels whose attention skips what is not there.
LONGEST = (128, 512, 2048, 8192)
#: Longest rows of levels whose rows are padded are multiples of this.
LENGTH_STEP = 64


class LevelSize(NamedTuple):
    """Room for the rows of a batch.

    Attributes:
        tokens, rows: most tokens and rows.
        longest: most tokens of a row.
    """

    tokens: int
    rows: int
    longest: int


def level_size(rows: int, tokens: int, longest: int, *, padded: bool) -> LevelSize | None:
    """Return the smallest level for a batch, or None where none is large enough.

    Batches of all sizes share few levels.

    Args:
        rows, tokens, longest: of the batch; at most so many.
        padded: whether attention runs on rows that are padded to the longest; a level then has room for few more rows
            and columns than there are.

    >>> level_size(32, 1000, 90, padded=False)
    LevelSize(tokens=1024, rows=64, longest=128)
    >>> level_size(32, 1000, 90, padded=True)
    LevelSize(tokens=1024, rows=32, longest=128)
    """
    if padded:
        most_rows, length = 1 << (rows - 1).bit_length(), -(-longest // LENGTH_STEP) * LENGTH_STEP
        size = next((n for n in _ladder() if n >= tokens), None)
        return None if size is None else LevelSize(size, most_rows, length)
    length = next((n for n in LONGEST if n >= longest), longest)
    for size in _ladder():
        most_rows = max(MIN_ROWS, min(size // TOKENS_PER_ROW, MAX_BLOCKS * BLOCK // length))
        if size >= tokens and most_rows >= rows:
            return LevelSize(size, most_rows, length)
    return None


def _ladder() -> list[int]:
    """Return the numbers of tokens of the levels: 64, 96, 128, 192, 256, 384, ..."""
    sizes = []
    size = MIN_TOKENS
    while size <= MAX_TOKENS:
        sizes += [size, size * 3 // 2]
        size *= 2
    return [n for n in sizes if n <= MAX_TOKENS]
