"""Labelled rows of a table: texts or pairs of texts, labels, and for rankings the query of each row.

Labels that are names or whole numbers are classes, in sorted order; other numbers are predicted by regression. With a
column that names the query of each row, labels are the relevance of a document to its query, a number of at least 0,
and one score a row is predicted, by which the documents of a query are ranked.
"""

from __future__ import annotations

import difflib
import math
import random
import re
import reprlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from earlyexit_kernels.data.table import Table

Text: TypeAlias = str | tuple[str, str]
CLASSES, NUMBERS = "single_label_classification", "regression"
METRICS = {CLASSES: ("accuracy",), NUMBERS: ("pearson", "spearman")}
RANKING_METRICS = ("ndcg", "mrr")
#: Label that stands for a hidden one in public data sets.
HIDDEN = -1
#: Class names that a message lists.
SHOWN = 8
#: Share of the labels below which numbers that are not whole look like mistakes.
FEW = 0.1
#: Similarity of two class names, of which one that occurs once looks like a misspelling of the other.
ALIKE = 0.75


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a table: a text, or a text and its pair, the label, and of rankings the query."""

    text: str = "text"
    pair: str | None = None
    label: str = "label"
    group: str | None = None


@dataclass(frozen=True)
class Labels:
    """What is predicted.

    Attributes:
        names: of the C classes, or one name for a number.
        problem_type: as in transformers.
    """

    names: tuple[str, ...]
    problem_type: str


@dataclass(frozen=True)
class Split:
    """Rows with labels.

    Attributes:
        texts: N texts, or N pairs of texts.
        labels: N class indices, or N numbers.
        groups: N numbers of the queries that the rows belong to, or empty.
        rows: N numbers of the rows in their file, from 1, or empty.
    """

    texts: Sequence[Text]
    labels: Sequence[float]
    groups: Sequence[int] = ()
    rows: Sequence[int] = field(default=(), compare=False)

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int]) -> Split:
        """Return the rows with these indices, in this order."""
        numbers = ([named[i] for i in rows] if named else () for named in (self.groups, self.rows))
        return Split([self.texts[i] for i in rows], [self.labels[i] for i in rows], *numbers)


def check_columns(table: Table, columns: Columns) -> None:
    """Raise ValueError if columns are missing; the message names all of them with their options."""
    named = {"--text-column": columns.text, "--pair-column": columns.pair, "--label-column": columns.label}
    named["--group-column"] = columns.group
    missing = {option: name for option, name in named.items() if name is not None and name not in table.columns}
    if missing:
        asked = " and ".join(f"{name!r} ({option})" for option, name in missing.items())
        plural = "s" * (len(missing) > 1)
        raise ValueError(f"{table.path} has no column{plural} {asked}; it has {reprlib.repr(list(table.columns))}")


def labels_in(table: Table, columns: Columns, *, problem: str | None = None) -> Labels:
    """Return what the labels of a table are.

    Args:
        table: with `columns`.
        columns: of which `group` makes the labels relevances.
        problem: `CLASSES` or `NUMBERS` where it is not to follow from the labels.

    Raises:
        ValueError: names mixed with numbers, numbers of which few are not whole, hidden labels, one label only, a name
            that looks misspelt, or hardly a label that occurs twice; the message names the line.
    """
    option = f"--label-column {columns.label}"
    parse = _parsed if columns.group is None else _relevance
    labels = [parse(value, table.where(row)) for row, value in enumerate(table.columns[columns.label])]
    kinds = [isinstance(label, str) for label in labels]
    if len(set(kinds)) == 2:
        at, other = kinds.index(False), kinds.index(True)
        raise ValueError(
            f"{option}: expected names or numbers, got both: {labels[other]!r} in {table.where(other)} and "
            f"{labels[at]!r} in {table.where(at)}"
        )
    counts = Counter(labels)
    if len(counts) == 1:
        raise ValueError(
            f"{option}: expected at least two different labels in {table.path}, all {len(labels)} are {labels[0]!r}"
        )
    broken = [row for row, label in enumerate(labels) if isinstance(label, float) and not label.is_integer()]
    if problem == NUMBERS and any(kinds):
        raise ValueError(f"{option}: expected numbers, since --problem regression is given; got {labels[0]!r}")
    if columns.group is not None or problem == NUMBERS:
        return Labels((columns.label,), NUMBERS)
    if broken and (problem == CLASSES or len(broken) < FEW * len(labels)):
        raise ValueError(
            f"{table.where(broken[0])}: expected a whole number as label, as in {len(labels) - len(broken)} other "
            f"rows, got {labels[broken[0]]}; correct it, or give --problem regression to predict numbers"
        )
    if broken:
        return Labels((columns.label,), NUMBERS)
    if HIDDEN in counts:
        raise ValueError(
            f"{table.where(labels.index(HIDDEN))}: -1 stands for a hidden label; leave such rows out, name the "
            "classes, e.g. negative, or give --problem regression to predict numbers"
        )
    if len(counts) > max(2, len(labels) // 2):
        raise ValueError(
            f"{option}: expected classes that occur twice or more on average, got {len(counts)} different labels in "
            f"{len(labels)} rows; give --problem regression to predict numbers"
        )
    _refuse_misspelt(table, labels, counts)
    different: list[Any] = sorted(counts)
    return Labels(tuple(map(_class_name, different)), CLASSES)


def _refuse_misspelt(table: Table, labels: Sequence[Any], counts: Counter) -> None:
    """Raise for a name that occurs once and is close to another; names with digits count as they are written."""
    names = {name: name.casefold() for name in counts if isinstance(name, str) and not re.search(r"\d", name)}
    for name in names:
        others = {folded: other for other, folded in names.items() if other != name and counts[other] > 1}
        nearest = difflib.get_close_matches(names[name], others, n=1, cutoff=ALIKE) if counts[name] == 1 else []
        if nearest:
            raise ValueError(
                f"{table.where(labels.index(name))}: expected a label that occurs in other rows, got {name!r}, which "
                f"is close to {others[nearest[0]]!r}; correct it, or leave the row out"
            )


def read_rows(table: Table, columns: Columns, labels: Labels) -> Split:
    """Return the rows of a table.

    Args:
        table: to read.
        columns: of the table.
        labels: as from `labels_in`, or those of a model; of classes named LABEL_0, LABEL_1, ... the numbers will do.

    Raises:
        ValueError: a missing column, an empty text, or another label; the message names the line.
    """
    check_columns(table, columns)
    texts = texts_of(table, columns)
    for row, text in enumerate(texts):
        if not all(part.strip() for part in ([text] if isinstance(text, str) else text)):
            raise ValueError(f"{table.where(row)}: expected a text, got an empty one; leave the row out")
    values = [(value, table.where(row)) for row, value in enumerate(table.columns[columns.label])]
    found: Sequence[float]
    if columns.group is not None:
        found = [_relevance(*value) for value in values]
    elif labels.problem_type == NUMBERS:
        found = [_number(*value) for value in values]
    else:
        numbers = {name: number for number, name in enumerate(labels.names)}
        if all(name == f"LABEL_{number}" for name, number in numbers.items()):
            numbers |= {str(number): number for number in numbers.values()}
        found = [_class(value, where, labels.names, numbers) for value, where in values]
    groups = () if columns.group is None else _groups(table, columns.group)
    return Split(texts, found, groups, range(1, len(found) + 1))


def texts_of(table: Table, columns: Columns) -> list[Text]:
    """Return the texts, or pairs of texts, of a table.

    Raises:
        ValueError: a column is missing, or a value is not a text; the message names the line.
    """
    first = _text_column(table, columns.text, "--text-column")
    if columns.pair is None:
        return list(first)
    return list(zip(first, _text_column(table, columns.pair, "--pair-column"), strict=True))


def hold_out(split: Split, rows: int, *, seed: int = 0) -> tuple[list[int], list[int]]:
    """Draw rows to hold out.

    Args:
        split: N rows.
        rows: number of rows to hold out, in ``[0, N)``. Rows of one query stay together: as many queries are held out
            as are needed for this number of rows.
        seed: random seed.

    Returns:
        the indices of the remaining rows, in drawn order, and of those held out.

    Raises:
        ValueError: `rows` is out of range, or no query is left.
    """
    if not 0 <= rows < len(split):
        raise ValueError(f"--holdout: expected fewer than the {len(split)} rows that there are, got {rows}")
    draw = random.Random(seed).random
    keys = [draw() for _ in range(len(split))]
    if split.groups:
        first = dict(zip(reversed(split.groups), reversed(keys), strict=True))
        keys = [first[group] for group in split.groups]
    order = sorted(range(len(split)), key=keys.__getitem__)
    while split.groups and 0 < rows < len(order) and keys[order[rows - 1]] == keys[order[rows]]:
        rows += 1  # to the end of the query
    if rows == len(order):
        raise ValueError(f"--holdout: expected fewer rows, the queries of {rows} rows are all that there are")
    return order[rows:], order[:rows]


def encode(split: Split, tokenizer: Any, *, max_length: int | None = None) -> list[dict[str, Any]]:
    """Tokenise rows.

    Args:
        split: N texts or pairs.
        tokenizer: a tokenizer from transformers.
        max_length: maximum tokens of a row; longer ones are cut (default: the limit of the tokenizer).

    Returns:
        N dicts of the tokenizer's outputs and ``labels``, without padding; `DataCollatorWithPadding` pads them.
    """
    pairs = len(split) > 0 and not isinstance(split.texts[0], str)
    texts = [list(part) for part in zip(*split.texts, strict=True)] if pairs else [list(split.texts)]
    found = tokenizer(*texts, truncation=True, max_length=max_length)
    return [{**{name: found[name][row] for name in found}, "labels": label} for row, label in enumerate(split.labels)]


def listed(names: Sequence[str]) -> str:
    """List the first names for a message."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _groups(table: Table, name: str) -> list[int]:
    """Return the number of the query of each row, in the order of the queries in the file."""
    numbers: dict[str, int] = {}
    found = []
    for row, value in enumerate(table.columns[name]):
        text = str(value).strip() if isinstance(value, (str, int)) else ""
        if not text:
            raise ValueError(
                f"{table.where(row)}: expected the name or number of a query in column {name!r}, got {_shown(value)}"
            )
        found.append(numbers.setdefault(text, len(numbers)))
    return found


def _text_column(table: Table, name: str, option: str) -> Sequence[str]:
    if name not in table.columns:
        raise ValueError(f"{option}: {table.path} has no column {name!r}; it has {reprlib.repr(list(table.columns))}")
    values = table.columns[name]
    for row, value in enumerate(values):
        if not isinstance(value, str):
            raise ValueError(f"{table.where(row)}: expected a text in column {name!r}, got {_shown(value)}")
    return values


def _shown(value: Any) -> str:
    return "none: the cell is empty" if value is None or value == "" else reprlib.repr(value)


def _parsed(value: Any, where: str) -> str | int | float:
    """Return a label as the name of a class or as a number.

    Raises:
        ValueError: no label, or a number that is not finite.
    """
    if isinstance(value, str):
        text = value.strip()
        if re.fullmatch(r"[+-]?\d{1,18}", text):
            return int(text)
        try:
            value = float(text)
        except ValueError:
            if text:
                return text
            value = None
    if isinstance(value, bool):
        return str(value)
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{where}: expected a label, a name or a finite number, got {_shown(value)}")
    return value


def _class_name(label: str | float) -> str:
    return label if isinstance(label, str) else str(int(label)) if label == int(label) else str(label)


def _number(value: Any, where: str) -> float:
    number = _parsed(value, where)
    if isinstance(number, str):
        raise ValueError(f"{where}: expected a number as label, as the model predicts, got {reprlib.repr(number)}")
    return float(number)


def _relevance(value: Any, where: str) -> float:
    relevance = _parsed(value, where)
    if isinstance(relevance, str) or relevance < 0:
        raise ValueError(
            f"{where}: expected as label the relevance of a document to its query, a number of at least 0, since "
            f"--group-column is given; got {reprlib.repr(relevance)}"
        )
    return float(relevance)


def _class(value: Any, where: str, names: Sequence[str], numbers: dict[str, int]) -> int:
    name = _class_name(_parsed(value, where))
    if name not in numbers:
        raise ValueError(f"{where}: expected a label of the model, {listed(names)}; got {name!r}")
    return numbers[name]
