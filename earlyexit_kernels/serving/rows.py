"""Rows of text: what a caller gives, what of it cannot be classified, token ids, and batches of about equal work."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: Columns of a text and of its pair.
TEXT, PAIR = "text", "text_pair"


def rows_of(given: Any) -> list[Any]:
    """Return rows, not yet checked.

    Args:
        given: texts or pairs of texts, or columns with `TEXT` and, for pairs, `PAIR`.

    Raises:
        ValueError: a single text, something that is not a list, or columns without texts or of different lengths.
    """
    if not isinstance(given, Mapping):
        return _listed("texts", given)
    if TEXT not in given:
        raise ValueError(
            f"Scorer: expected a column {TEXT!r}, and {PAIR!r} for pairs, got {sorted(map(str, given))}; rename the "
            "column, or pass its values"
        )
    columns = [_listed(name, given[name]) for name in (TEXT, PAIR) if name in given]
    if len({len(column) for column in columns}) > 1:
        raise ValueError(
            f"Scorer: expected columns of one length, got {' and '.join(str(len(column)) for column in columns)} rows"
        )
    return columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))


def _listed(name: str, values: Any) -> list[Any]:
    cure = "; pass a list with one text" if isinstance(values, (str, bytes)) else ""
    if hasattr(values, "columns"):  # a frame, which iterates over the names of its columns
        cure = "; pass its columns, frame.to_dict('list'), or one of them"
    if cure or isinstance(values, (set, frozenset)) or not isinstance(values, Iterable):
        raise ValueError(f"Scorer: expected {name} to be a list, got {type(values).__name__}{cure}")
    return values.tolist() if hasattr(values, "tolist") else list(values)


def problem_of(row: Any) -> str:
    """Return why a row cannot be classified, or an empty string.

    Args:
        row: a text, or a tuple or list of two texts.
    """
    texts = row if isinstance(row, (tuple, list)) else (row,)
    if isinstance(row, (tuple, list)) and len(row) != 2:
        return f"expected a text or a pair of texts, got {len(row)} of them"
    for text in texts:
        if not isinstance(text, str):
            return f"expected a text, got {reprlib.repr(text)}"
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return f"expected Unicode text, got half a character, {text[error.start]!a}, at position {error.start}"
    return "" if any(text.strip() for text in texts) else "expected some text, got an empty one"


#: What to do about a row that is too long, in the words of Python; the server and the command say it in theirs.
SHORTEN_IN_PYTHON = "shorten it, or pass truncate=True"


@dataclass(frozen=True)
class Encoded:
    """Rows as token ids.

    Attributes:
        rows: inputs of a row by name, of the rows without a problem.
        numbers: number of each of them, among all rows.
        problems: number of each other row -> why it cannot be classified.
    """

    rows: list[dict[str, list[int]]]
    numbers: list[int]
    problems: dict[int, str]


def encode(rows: Sequence[Any], tokenizer: Any, *, max_length: int, truncate: bool) -> Encoded:
    """Tokenise rows, without padding; rows of another kind than the first one, texts or pairs, are a problem.

    Args:
        rows: texts or pairs.
        tokenizer: of transformers.
        max_length: maximum number of tokens of a row.
        truncate: cut longer rows; otherwise they are a problem.

    Raises:
        ValueError: `max_length` leaves no room for text.
    """
    problems = {number: problem for number, row in enumerate(rows) if (problem := problem_of(row))}
    good = [number for number in range(len(rows)) if number not in problems]
    pairs = bool(good) and not isinstance(rows[good[0]], str)
    for number in good:
        if isinstance(rows[number], str) == pairs:
            kinds = ("a pair of texts", "a text") if pairs else ("a text", "a pair of texts")
            problems[number] = f"expected {kinds[0]}, as in row {good[0]}, got {kinds[1]}"
    good = [number for number in good if number not in problems]
    if not good:
        return Encoded([], [], problems)
    least = tokenizer.num_special_tokens_to_add(pair=pairs) + 1 + pairs
    if max_length < least:
        raise ValueError(f"Scorer: expected max_length of at least {least} for this tokenizer, got {max_length}")
    texts = (
        [list(column) for column in zip(*(rows[n] for n in good), strict=True)]
        if pairs
        else [[*map(rows.__getitem__, good)]]
    )
    cut = {"truncation": True, "max_length": max_length} if truncate else {}
    found = tokenizer(*texts, **cut, verbose=False)
    encoded = [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]
    for number, row in zip(good, encoded, strict=True):
        tokens = len(row["input_ids"])
        if not tokens:
            problems[number] = "expected some text, got one without tokens"
        elif tokens > max_length:
            problems[number] = f"expected at most {max_length} tokens, got {tokens}; {SHORTEN_IN_PYTHON}"
    kept = [(number, row) for number, row in zip(good, encoded, strict=True) if number not in problems]
    return Encoded([row for _, row in kept], [number for number, _ in kept], problems)


def token_batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Yield rows in batches, the longest first, each of at most `max_tokens` tokens, or of one row with more.

    Args:
        lengths: number of tokens of each row.
        max_tokens: of a batch, without padding.
    """
    batch: list[int] = []
    tokens = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if batch and tokens + lengths[row] > max_tokens:
            yield batch
            batch, tokens = [], 0
        batch.append(row)
        tokens += lengths[row]
    if batch:
        yield batch
