"""Read the columns of a CSV, TSV, JSON lines or Parquet file, and write such a file; the format follows the ending.

CSV and TSV are read with Python's `csv`, which refuses rows with too few or too many columns; `datasets` (extra
``train``), by which JSON lines and Parquet are read, pads such rows.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import reprlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

#: Columns are separated by TAB, without quoting, so that a quotation mark is part of the text.
TABS: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None}
COMMAS: dict[str, Any] = {"delimiter": ",", "strict": True}
#: Byte order marks of UTF-16.
UTF_16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class Table:
    """The columns of a file.

    Attributes:
        path: of the file.
        columns: name -> N values; strings in CSV and TSV files.
        lines: first line of each row, 1-based, or empty for a format without lines.
    """

    path: Path
    columns: Mapping[str, Sequence[Any]]
    lines: Sequence[int] = ()

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def where(self, row: int) -> str:
        """Return file and line of a row, for messages."""
        return f"{self.path}, line {self.lines[row]}" if self.lines else f"{self.path}, row {row + 1}"


def read_table(path: Path) -> Table:
    """Read a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: another ending than those of `FORMATS`, contents of another format, a column that occurs twice, or
            no rows.
        ImportError: `datasets` is required and not installed.
    """
    read = format_of(path).read
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected a file, it does not exist")
    table = read(path)
    if not len(table):
        raise ValueError(f"{path}{', line 2' * bool(table.columns)}: expected at least one row, got none")
    return table


def write_table(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write a new file, whole or not at all.

    Raises:
        FileExistsError: the file exists.
        OSError: it cannot be written.
        ValueError: an ending, or a value, that the format does not allow.
    """
    write = format_of(path).write
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name[:64]}.") as folder:
        beside = Path(folder) / path.name
        with beside.open("wb") as file:
            write(file, columns)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        beside.replace(path)


def format_of(path: Path) -> Format:
    """Return the format of a file.

    Raises:
        ValueError: the ending is none of `FORMATS`.
    """
    found = FORMATS.get(path.suffix.lower())
    if found is None:
        raise ValueError(f"{path}: expected a file name that ends in {', '.join(FORMATS)}")
    return found


def read_text(path: Path) -> str:
    """Return the contents of a UTF-8 file without its byte order mark; line ends are kept.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not UTF-8; the message names the line.
    """
    data = path.read_bytes()
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        encoding = "UTF-16" if data[:2] in UTF_16 else "LATIN1"
        cure = f"convert it, e.g. with iconv -f {encoding} -t UTF-8"
        raise ValueError(
            f"{path}, line {line}: expected UTF-8 text, got the byte {data[error.start]:#04x}; {cure}"
        ) from None


def read_delimited(path: Path, **options: Any) -> Table:
    """Read a file with one header row.

    Args:
        path: of the file.
        options: of `csv.reader`, `TABS` or `COMMAS`.

    Raises:
        OSError: the file cannot be read.
        ValueError: not UTF-8, a column that occurs twice, or a row of another length; the message names the line.
    """
    rows = csv.reader(io.StringIO(read_text(path), newline=""), **options)
    limit = csv.field_size_limit(sys.maxsize)
    try:
        header = next(rows, [])
        _refuse_doubled(f"{path}, line 1", header)
        lines, cells, line = [], [], rows.line_num + 1
        for row in rows:
            if len(row) != len(header):
                raise ValueError(
                    f"{path}, line {line}: expected {len(header)} columns, got {len(row)}{_separator_hint(header)}"
                )
            lines.append(line)
            cells.append(row)
            line = rows.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}: expected {path.suffix[1:].upper()}, got {error}") from error
    finally:
        csv.field_size_limit(limit)
    return Table(
        path, dict(zip(header, zip(*cells, strict=True) if cells else ((),) * len(header), strict=True)), lines
    )


def _separator_hint(header: Sequence[str]) -> str:
    """Return a hint for a header that another character than a comma seems to separate, or an empty string."""
    if len(header) == 1 and ";" in header[0]:
        return "; its header looks separated by ';', expected commas"
    return ""


def _refuse_doubled(where: str, names: Sequence[str]) -> None:
    doubled = next((name for at, name in enumerate(names) if name in names[:at]), None)
    if doubled is not None:
        raise ValueError(f"{where}: expected different columns, got {reprlib.repr(doubled)} twice")


def _read_json_lines(path: Path) -> Table:
    lines = [number for number, line in enumerate(read_text(path).split("\n"), start=1) if line.strip()]
    if not lines:
        return Table(path, {})
    columns = _read_with_datasets(path, "from_json", lambda: _refuse_bad_json(path))
    if len(next(iter(columns.values()), ())) != len(lines):
        _refuse_bad_json(path)
        raise ValueError(f"{path}: expected one JSON object a line, got {len(lines)} lines with another number of rows")
    return Table(path, columns, lines)


def _refuse_bad_json(path: Path) -> None:
    """Raise for the first line that is not a JSON object with different names."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        where = f"{path}, line {number}"
        try:
            value = json.loads(line or "{}", object_pairs_hook=partial(_object, where))
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{where}: expected a JSON object, got {reprlib.repr(line)} ({error})") from error
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected a JSON object, got {reprlib.repr(line)}")


def _object(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _refuse_doubled(where, [name for name, _ in pairs])
    return dict(pairs)


def _read_parquet(path: Path) -> Table:
    return Table(path, _read_with_datasets(path, "from_parquet", lambda: None))


def _read_with_datasets(path: Path, reader: str, explain: Callable[[], None]) -> dict[str, list[Any]]:
    """Return the columns that a reader of `datasets.Dataset` finds, without a network and without its cache.

    Args:
        path: of the file.
        reader: name of the method.
        explain: raises an error that says more than that of `datasets`.
    """
    try:
        from datasets import Dataset
    except ImportError as error:
        raise ImportError(
            f"{path}: JSON lines and Parquet require `pip install datasets`; CSV and TSV do not"
        ) from error
    path.open("rb").close()  # an error of the system says more than one of `datasets`
    with tempfile.TemporaryDirectory(prefix="earlyexit-") as cache, _quiet():
        plain = Path(cache) / f"data{path.suffix}"  # `datasets` takes brackets in a name for a pattern
        plain.symlink_to(path.resolve())
        try:
            found = getattr(Dataset, reader)(str(plain), cache_dir=cache, keep_in_memory=True)
        except Exception as error:  # of many classes, those of pyarrow among them
            explain()
            reason = error.__cause__ or error
            raise ValueError(f"{path}: could not be read: {str(reason) or type(reason).__name__}") from error
        return {name: list(found[name]) for name in found.column_names}


@contextmanager
def _quiet() -> Iterator[None]:
    """Turn the progress bars and the log of `datasets` off."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from datasets.utils import logging

    bars, level = not are_progress_bars_disabled(), logging.get_verbosity()
    disable_progress_bars()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            enable_progress_bars()


def _write_delimited(options: Mapping[str, Any]) -> Callable[[Any, Mapping[str, Sequence[Any]]], None]:
    def write(file: Any, columns: Mapping[str, Sequence[Any]]) -> None:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
        writer = csv.writer(text, lineterminator="\n", **options)
        try:
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))
        except csv.Error as error:
            raise ValueError(f"a text with a tab or a line end does not fit in TSV ({error}); write CSV") from error
        text.detach()

    return write


def _write_json_lines(file: Any, columns: Mapping[str, Sequence[Any]]) -> None:
    for row in zip(*columns.values(), strict=True):
        line = json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False, default=str)
        file.write(f"{line}\n".encode())


def _write_parquet(file: Any, columns: Mapping[str, Sequence[Any]]) -> None:
    from datasets import Dataset

    with _quiet():
        Dataset.from_dict({name: list(values) for name, values in columns.items()}).to_parquet(file)


@dataclass(frozen=True)
class Format:
    """How a format is read and written."""

    read: Callable[[Path], Table]
    write: Callable[[Any, Mapping[str, Sequence[Any]]], None]


#: Ending of the name -> its format.
FORMATS: dict[str, Format] = {
    ".csv": Format(lambda path: read_delimited(path, **COMMAS), _write_delimited({"delimiter": ","})),
    ".tsv": Format(lambda path: read_delimited(path, **TABS), _write_delimited(TABS)),
    ".jsonl": Format(_read_json_lines, _write_json_lines),
    ".parquet": Format(_read_parquet, _write_parquet),
}
