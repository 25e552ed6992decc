"""Read the columns of a CSV, TSV, JSON lines or Parquet file, and write such a file; the format follows the ending.

CSV and TSV are read with Python's `csv`, which refuses an unclosed quote and rows of another length, and JSON lines
with `json`, which leaves texts that look like dates, and large numbers, as they are.
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
        lines: first line of each row, 1-based, or empty for Parquet.
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
            no rows; the message names the line.
        ImportError: pyarrow is required and not installed.
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
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: expected a file name that ends in {', '.join(FORMATS)}")
    return FORMATS[path.suffix.lower()]


def _text_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 file with their ends, without its byte order mark.

    Raises:
        ValueError: a line is not UTF-8.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            data = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            try:
                yield data.decode("utf-8")
            except UnicodeDecodeError as error:
                # Latin-1 in practice is Windows-1252, whose quotation marks would become control characters
                encoding = "UTF-16" if number == 1 and data[:2] in UTF_16 else "WINDOWS-1252"
                raise ValueError(
                    f"{path}, line {number}: expected UTF-8 text, got the byte {data[error.start]:#04x}; convert it, "
                    f"e.g. with iconv -f {encoding} -t UTF-8"
                ) from None


def _read_delimited(path: Path, **options: Any) -> Table:
    """Read a file with one header row; blank lines are skipped.

    Args:
        path: of the file.
        options: of `csv.reader`, `TABS` or `COMMAS`.
    """
    rows = csv.reader(_text_lines(path), **options)
    lines: list[int] = []
    limit = csv.field_size_limit(sys.maxsize)
    try:
        header = next(rows, [])
        _refuse_doubled(f"{path}, line 1", header)
        columns: list[list[str]] = [[] for _ in header]
        line = rows.line_num + 1
        for row in rows:
            if row:
                if len(row) != len(header):
                    raise ValueError(
                        f"{path}, line {line}: expected {len(header)} columns, got {len(row)}{_separator_hint(header)}"
                    )
                lines.append(line)
                for column, cell in zip(columns, row, strict=True):
                    column.append(cell)
            line = rows.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}: expected {path.suffix[1:].upper()}, got {error}") from error
    finally:
        csv.field_size_limit(limit)
    return Table(path, dict(zip(header, columns, strict=True)), lines)


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
    """Read one JSON object a line; a row without one of the columns has None there."""
    rows, lines = [], []
    for number, line in enumerate(_text_lines(path), start=1):
        line = line.strip()
        if not line:
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line, object_pairs_hook=partial(_object, where))
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{where}: expected a JSON object, got {reprlib.repr(line)} ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected a JSON object, got {reprlib.repr(line)}")
        rows.append(row)
        lines.append(number)
    names = dict.fromkeys(name for row in rows for name in row)
    return Table(path, {name: [row.get(name) for row in rows] for name in names}, lines)


def _object(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _refuse_doubled(where, [name for name, _ in pairs])
    return dict(pairs)


def _pyarrow(path: Path) -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f"{path}: Parquet requires `pip install pyarrow`; CSV, TSV and JSON lines do not") from error
    return parquet


def _read_parquet(path: Path) -> Table:
    parquet = _pyarrow(path)
    path.open("rb").close()  # an error of the system says more than one of pyarrow
    try:
        found = parquet.ParquetFile(path).read()
    except Exception as error:  # pyarrow raises OSError, ValueError, TypeError and classes of its own
        raise ValueError(f"{path}: could not be read: {str(error) or type(error).__name__}") from error
    _refuse_doubled(str(path), found.column_names)
    return Table(path, found.to_pydict())


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
    parquet = _pyarrow(Path(file.name))
    import pyarrow

    parquet.write_table(pyarrow.table({name: list(values) for name, values in columns.items()}), file)


@dataclass(frozen=True)
class Format:
    """How a format is read and written."""

    read: Callable[[Path], Table]
    write: Callable[[Any, Mapping[str, Sequence[Any]]], None]


#: Ending of the name -> its format.
FORMATS: dict[str, Format] = {
    ".csv": Format(partial(_read_delimited, **COMMAS), _write_delimited({"delimiter": ","})),
    ".tsv": Format(partial(_read_delimited, **TABS), _write_delimited(TABS)),
    ".jsonl": Format(_read_json_lines, _write_json_lines),
    ".parquet": Format(_read_parquet, _write_parquet),
}
