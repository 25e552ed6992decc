"""A user's own files as a task: texts and labels by column, and classes or numbers by what the labels look like.

Labels that are whole numbers are classes, other numbers are predicted by regression, and anything else is the name of a
class. Classes are sorted. With a column that names the query of each row, labels are the relevance of a document to its
query, a number of at least 0, and one score a row is predicted, by which the documents of a query are ranked.
"""

from __future__ import annotations

import hashlib
import math
import re
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from earlyexit_kernels.data.table import Table, read_table
from earlyexit_kernels.tasks.load import Task
from earlyexit_kernels.tasks.sources import HIDDEN, Split, Text

CLASSES, NUMBERS = "single_label_classification", "regression"
METRICS = {CLASSES: ("accuracy",), NUMBERS: ("pearson", "spearman")}
RANKING_METRICS = ("ndcg", "mrr")
#: Class names that a message lists.
SHOWN = 8


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a user's files: a text, or a text and its pair, the label, and of rankings the query."""

    text: str = "text"
    pair: str | None = None
    label: str = "label"
    group: str | None = None


@dataclass(frozen=True)
class OwnData:
    """A user's files, sufficient to read the same rows again.

    Attributes:
        train: absolute path of the train file.
        digest: SHA-256 of the train file; rows held out are found by their positions in it.
        dev: absolute path of the dev file, or None.
        columns: of both.
        label_names: names of the C classes, or the label's column for regression.
        problem_type: as in transformers.
    """

    train: str
    digest: str
    dev: str | None
    columns: Columns
    label_names: tuple[str, ...]
    problem_type: str

    @property
    def name(self) -> str:
        """Name of the train file without its folder."""
        return Path(self.train).name

    @staticmethod
    def from_dict(data: Any) -> OwnData:
        """Rebuild from the data of `dataclasses.asdict`.

        Raises:
            ValueError, TypeError: the data is not that of own files.
        """
        own = OwnData(**{**data, "columns": Columns(**data["columns"]), "label_names": tuple(data["label_names"])})
        texts = [own.train, own.digest, own.columns.text, own.columns.label, *own.label_names]
        texts += [text for text in (own.dev, own.columns.pair, own.columns.group) if text is not None]
        if not all(isinstance(text, str) for text in texts) or not own.label_names or own.problem_type not in METRICS:
            raise ValueError("expected paths, columns, label names and a problem type in the entry 'data'")
        return own


def read_own(train: Path, dev: Path | None, columns: Columns) -> tuple[OwnData, Task]:
    """Read a user's files and find out what their labels are.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file of another format, a missing column, unusable labels, or a dev label that train lacks.
    """
    if dev is not None and dev.exists() and train.exists() and dev.samefile(train):
        raise ValueError(f"--dev: expected other rows than those of --train, got {dev} for both")
    table = read_table(train)
    _check_columns(table, columns)
    label_names, problem_type = _label_names(table, columns)
    own = OwnData(
        str(train.resolve()),
        digest_of(train),
        None if dev is None else str(dev.resolve()),
        columns,
        label_names,
        problem_type,
    )
    splits = {"train": _split(table, own)}
    if dev is not None:
        splits["dev"] = _split(read_table(dev), own)
    return own, _task(own, splits, str(train))


def load_own(own: OwnData, *, dev: Path | None = None) -> Task:
    """Read the files of a model again.

    Args:
        own: the files that it was trained with.
        dev: other rows instead, with the same columns; the task then has no train split.

    Raises:
        OSError: a file cannot be read, or is gone.
        ValueError: the train file has changed, or as for `read_own`.
    """
    if dev is not None:
        return _task(own, {"dev": _split(read_table(dev), own)}, str(dev))
    for path in filter(None, (own.train, own.dev)):
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"{path}, with which the model was trained, is gone; give a file with the same columns with --dev, "
                "with rows that the model was not trained on"
            )
    if digest_of(Path(own.train)) != own.digest:
        raise ValueError(
            f"{own.train} has changed since the model was trained, so that the rows held out cannot be told from those "
            "trained on; give a file with the same columns with --dev, with rows that the model was not trained on"
        )
    splits = {"train": _split(read_table(Path(own.train)), own)}
    if own.dev is not None:
        splits["dev"] = _split(read_table(Path(own.dev)), own)
    return _task(own, splits, own.train)


def texts_of(table: Table, text: str, pair: str | None) -> list[Text]:
    """Return the texts, or pairs of texts, of a file.

    Raises:
        ValueError: a column is missing, or a value is not a text; the message names the line.
    """
    first = _text_column(table, text, "--text-column")
    if pair is None:
        return list(first)
    return list(zip(first, _text_column(table, pair, "--pair-column"), strict=True))


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _task(own: OwnData, splits: dict[str, Split], source: str) -> Task:
    metrics = METRICS[own.problem_type] if own.columns.group is None else RANKING_METRICS
    return Task(own.name, splits, own.label_names, metrics, own.problem_type, source, hidden=None)


def _split(table: Table, own: OwnData) -> Split:
    to_label = _to_number if own.problem_type == NUMBERS else _to_class(own)
    if own.columns.group is not None:
        to_label = _to_relevance
    values = column_of(table, own.columns.label, "--label-column")
    texts = texts_of(table, own.columns.text, own.columns.pair)
    labels = [to_label(value, table.where(row)) for row, value in enumerate(values)]
    return Split(texts, labels, groups=() if own.columns.group is None else _groups(table, own.columns.group))


def _groups(table: Table, name: str) -> list[int]:
    """Return the number of the query of each row, in the order of the queries in the file."""
    numbers: dict[str, int] = {}
    found = []
    for row, value in enumerate(column_of(table, name, "--group-column")):
        text = str(value).strip() if isinstance(value, (str, int)) else ""
        if not text:
            raise ValueError(
                f"{table.where(row)}: expected the name or number of a query in column {name!r}, got "
                f"{'none: the cell is empty' if value is None or value == '' else reprlib.repr(value)}"
            )
        found.append(numbers.setdefault(text, len(numbers)))
    return found


def column_of(table: Table, name: str, option: str) -> Sequence[Any]:
    """Return a column of a file.

    Raises:
        ValueError: it is missing; the message names the option, and the columns that there are.
    """
    if name not in table.columns:
        raise ValueError(f"{option}: {table.path} has no column {name!r}; it has {reprlib.repr(list(table.columns))}")
    return table.columns[name]


def _check_columns(table: Table, columns: Columns) -> None:
    """Raise ValueError if columns are missing; the message names all of them with their options."""
    named = {"--text-column": columns.text, "--pair-column": columns.pair, "--label-column": columns.label}
    named["--group-column"] = columns.group
    missing = {option: name for option, name in named.items() if name is not None and name not in table.columns}
    if missing:
        asked = " and ".join(f"{name!r} ({option})" for option, name in missing.items())
        plural = "s" * (len(missing) > 1)
        raise ValueError(f"{table.path} has no column{plural} {asked}; it has {reprlib.repr(list(table.columns))}")


def _text_column(table: Table, name: str, option: str) -> list[str]:
    values = column_of(table, name, option)
    for row, value in enumerate(values):
        if not isinstance(value, str):
            raise ValueError(f"{table.where(row)}: expected a text in column {name!r}, got {reprlib.repr(value)}")
    return list(values)


def _parsed(value: Any, where: str) -> str | int | float:
    """Return a label as the name of a class, a whole number or another number.

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
        got = "none: the cell is empty" if value is None else reprlib.repr(value)
        raise ValueError(f"{where}: expected a label, a name or a finite number, got {got}")
    return value


def _to_number(value: Any, where: str) -> float:
    number = _parsed(value, where)
    if isinstance(number, str):
        raise ValueError(f"{where}: expected a number as label, as in the train file, got {reprlib.repr(number)}")
    return float(number)


def _to_relevance(value: Any, where: str) -> float:
    relevance = _parsed(value, where)
    if isinstance(relevance, str) or relevance < 0:
        raise ValueError(
            f"{where}: expected as label the relevance of a document to its query, a number of at least 0, since "
            f"--group-column is given; got {reprlib.repr(relevance)}"
        )
    return float(relevance)


def _to_class(own: OwnData) -> Callable[[Any, str], int]:
    numbers = {name: number for number, name in enumerate(own.label_names)}

    def to_class(value: Any, where: str) -> int:
        name = str(_parsed(value, where))
        if name not in numbers:
            raise ValueError(f"{where}: expected a label of the train file, {listed(own.label_names)}; got {name!r}")
        return numbers[name]

    return to_class


def listed(names: Sequence[str]) -> str:
    """List the first names for a message."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _label_names(table: Table, columns: Columns) -> tuple[tuple[str, ...], str]:
    """Return the names of the classes and the problem type.

    Raises:
        ValueError: names and numbers mixed, hidden labels, one label only, or hardly a label that occurs twice.
    """
    values = column_of(table, columns.label, "--label-column")
    parsed = _parsed if columns.group is None else _to_relevance
    labels = [parsed(value, table.where(row)) for row, value in enumerate(values)]
    kinds = [isinstance(label, str) for label in labels]
    if len(set(kinds)) == 2:
        at, other = kinds.index(False), kinds.index(True)
        raise ValueError(
            f"--label-column {columns.label}: expected names or numbers, got both: {labels[other]!r} in "
            f"{table.where(other)} and {labels[at]!r} in {table.where(at)}"
        )
    different: list[Any] = sorted(set(labels))
    if len(different) == 1:
        raise ValueError(
            f"--label-column {columns.label}: expected at least two different labels in {table.path}, all "
            f"{len(labels)} are {different[0]!r}"
        )
    if any(isinstance(label, float) for label in labels):
        return (columns.label,), NUMBERS
    if HIDDEN in different:
        raise ValueError(
            f"{table.where(labels.index(HIDDEN))}: -1 stands for a hidden label; leave such rows out, or name the "
            "classes, e.g. negative"
        )
    if len(different) > max(2, len(labels) // 2):
        raise ValueError(
            f"--label-column {columns.label}: expected classes that occur twice or more on average, got "
            f"{len(different)} different labels in {len(labels)} rows; numbers to predict by regression are written as "
            "decimals, e.g. 3.0"
        )
    return tuple(map(str, different)), CLASSES
