"""Files of a table: found by path, folder or pattern, and read as ranges of rows. Requires pyarrow (extra `ray`)."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.csv
import pyarrow.fs
import pyarrow.parquet

#: Rows that are held at a time.
CHUNK_ROWS = 4096
#: Maximum bytes of a row of CSV.
CSV_BYTES = 16 * 2**20
IS_PATTERN = re.compile(r"[*?\[]")
#: Options at the end of a URI, as in ``s3://bucket/rows?region=eu-west-1``.
URI_OPTIONS = re.compile(r"\?\w+=.*$")


@dataclass(frozen=True)
class File:
    """A file of a file system of pyarrow.

    Attributes:
        filesystem: that has the file; it can be pickled.
        path: of the file in it.
        name: absolute path or URI, for messages.
        size: in bytes.
        mtime_ns: time of the last change, in nanoseconds; 0 if not known.
    """

    filesystem: Any
    path: str
    name: str
    size: int
    mtime_ns: int

    @property
    def format(self) -> Format:
        """How the file is read."""
        return FORMATS[os.path.splitext(self.path)[1].lower()]


class Contents(NamedTuple):
    """Columns and number of rows of a file."""

    schema: pa.Schema
    rows: int


def find_files(patterns: Sequence[str]) -> list[File]:
    """Return the files that paths, folders or patterns name, each once, by their names.

    Args:
        patterns: local paths, or URIs that may end in options of pyarrow (``s3://bucket/rows?region=eu-west-1``).
            ``*``, ``?`` and ``[...]`` stand for characters within a name, ``**`` for folders. Of a folder, the files
            below it that end as a table does are taken; names that begin with ``.`` or ``_`` are left out.

    Raises:
        OSError: a pattern names no file, or the file system cannot be reached.
        ValueError: a URI of an unknown kind, or a file that does not end as a table does.
    """
    found: dict[str, File] = {}
    for pattern in patterns:
        files = list(_matching(pattern))
        if not files:
            raise FileNotFoundError(f"--input: expected files that end in {', '.join(FORMATS)}, {pattern} names none")
        found |= {file.name: file for file in files}
    return [found[name] for name in sorted(found)]


def _matching(pattern: str) -> Iterator[File]:
    is_uri = "://" in pattern
    literal = not is_uri and os.path.exists(pattern)
    options = URI_OPTIONS.search(pattern) if is_uri else None
    text = pattern[: options and options.start()] if is_uri else os.path.abspath(pattern)
    first = None if literal else IS_PATTERN.search(text)
    cut = len(text) if first is None else text.rindex("/", 0, first.start()) + 1
    base, segments = text[:cut].rstrip("/") or "/", [part for part in text[cut:].split("/") if part]
    try:
        uri = base + (options.group() if options else "")
        system, root = pa.fs.FileSystem.from_uri(uri) if is_uri else (pa.fs.LocalFileSystem(), base)
    except pa.ArrowInvalid as error:
        raise ValueError(f"--input: {pattern}: {error}") from error
    prefix = base.removesuffix(root)
    for info in _below(system, system.get_file_info(root), segments):
        if info.type == pa.fs.FileType.Directory:
            inside = system.get_file_info(pa.fs.FileSelector(info.path, recursive=True))
            files = [one for one in inside if one.is_file and _ending(one.path) in FORMATS and not _hidden(info, one)]
        else:
            files = [info]
        for one in files:
            if _ending(one.path) not in FORMATS:
                raise ValueError(f"--input: expected files that end in {', '.join(FORMATS)}, got {prefix + one.path}")
            yield File(system, one.path, prefix + one.path, one.size, one.mtime_ns or 0)


def _below(system: Any, info: Any, segments: Sequence[str]) -> Iterator[Any]:
    """Yield what the segments of a pattern name below a path."""
    if info.type == pa.fs.FileType.NotFound:
        return
    if not segments:
        yield info
        return
    if info.type != pa.fs.FileType.Directory:
        return
    head, rest = segments[0], segments[1:]
    if not IS_PATTERN.search(head):
        yield from _below(system, system.get_file_info(f"{info.path.rstrip('/')}/{head}"), rest)
        return
    if head == "**":
        yield from _below(system, info, rest)
    for one in sorted(system.get_file_info(pa.fs.FileSelector(info.path)), key=lambda one: one.path):
        if one.base_name.startswith((".", "_")) and head[0] != one.base_name[0]:
            continue
        if head == "**" and one.type == pa.fs.FileType.Directory:
            yield from _below(system, one, segments)
        elif head != "**" and fnmatchcase(one.base_name, head):
            yield from _below(system, one, rest)


def _ending(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _hidden(folder: Any, file: Any) -> bool:
    parts = file.path[len(folder.path) :].strip("/").split("/")
    return any(part.startswith((".", "_")) for part in parts)


def _inspect_parquet(file: File) -> Contents:
    with file.filesystem.open_input_file(file.path) as stream:
        found = pa.parquet.ParquetFile(stream)
        return Contents(found.schema_arrow.remove_metadata(), found.metadata.num_rows)


def _read_parquet(file: File, schema: pa.Schema, start: int, stop: int) -> Iterator[pa.Table]:
    with file.filesystem.open_input_file(file.path) as stream:
        found = pa.parquet.ParquetFile(stream)
        groups, first, row = [], None, 0
        for group in range(found.num_row_groups):
            end = row + found.metadata.row_group(group).num_rows
            if row < stop and start < end:
                groups.append(group)
                first = row if first is None else first
            row = end
        yield from _between(found.iter_batches(CHUNK_ROWS, groups), start - (first or 0), stop - (first or 0))


def _between(batches: Iterator[pa.RecordBatch], start: int, stop: int) -> Iterator[pa.Table]:
    """Yield the rows of batches from `start` to `stop`."""
    row = 0
    for batch in batches:
        low, high = max(start - row, 0), min(stop - row, batch.num_rows)
        if low < high:
            yield pa.Table.from_batches([batch.slice(low, high - low)])
        row += batch.num_rows
        if row >= stop:
            return


def _open_csv(file: File, delimiter: str) -> Any:
    """Open a file of which all columns are texts; an empty cell is an empty text."""
    quote: Any = '"' if delimiter == "," else False
    parse = pa.csv.ParseOptions(delimiter=delimiter, quote_char=quote, newlines_in_values=bool(quote))
    options = pa.csv.ReadOptions(block_size=CSV_BYTES, use_threads=False)
    with file.filesystem.open_input_stream(file.path) as stream:
        line = stream.read(2**20).decode("utf-8-sig", errors="replace")
    names = next(csv.reader(line.splitlines(), delimiter=delimiter, quoting=0 if quote else csv.QUOTE_NONE), [])
    doubled = next((name for at, name in enumerate(names) if name in names[:at]), None)
    if doubled is not None:
        raise ValueError(f"expected different columns, got {doubled!r} twice")
    convert = pa.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False)
    return pa.csv.open_csv(file.filesystem.open_input_stream(file.path), options, parse, convert)


def _inspect_csv(file: File, *, delimiter: str) -> Contents:
    with _open_csv(file, delimiter) as reader:
        return Contents(reader.schema, sum(batch.num_rows for batch in reader))


def _read_csv(file: File, schema: pa.Schema, start: int, stop: int, *, delimiter: str) -> Iterator[pa.Table]:
    with _open_csv(file, delimiter) as reader:
        for table in _between(reader, start, stop):
            for low in range(0, table.num_rows, CHUNK_ROWS):
                yield table.slice(low, CHUNK_ROWS)


def _json_chunks(file: File, start: int = 0, stop: int | None = None) -> Iterator[tuple[list[str], list[Any]]]:
    """Yield names and rows of some thousand lines at a time; empty lines are left out."""
    with io.BufferedReader(file.filesystem.open_input_stream(file.path), 2**20) as stream:
        numbered = ((number, line) for number, line in enumerate(stream, start=1) if line.strip())
        lines = islice(numbered, start, stop)
        while chunk := list(islice(lines, CHUNK_ROWS)):
            rows = [_json_row(number, line) for number, line in chunk]
            yield list(dict.fromkeys(name for row in rows for name in row)), rows


def _json_row(number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {number}: expected a JSON object ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"line {number}: expected a JSON object, got {type(row).__name__}")
    return row


def _inspect_json(file: File) -> Contents:
    schema, count = pa.schema([]), 0
    for names, rows in _json_chunks(file):
        found = pa.schema([(name, pa.array([row.get(name) for row in rows]).type) for name in names])
        schema = pa.unify_schemas([schema, found], promote_options="permissive")
        count += len(rows)
    return Contents(schema, count)


def _read_json(file: File, schema: pa.Schema, start: int, stop: int) -> Iterator[pa.Table]:
    for _, rows in _json_chunks(file, start, stop):
        yield pa.Table.from_pylist(rows, schema=schema)


class Format(NamedTuple):
    """How a format is read: columns and number of rows, and tables with the rows of a range."""

    inspect: Callable[[File], Contents]
    read: Callable[[File, pa.Schema, int, int], Iterator[pa.Table]]


#: Ending of the name -> its format.
FORMATS: dict[str, Format] = {
    ".parquet": Format(_inspect_parquet, _read_parquet),
    ".csv": Format(partial(_inspect_csv, delimiter=","), partial(_read_csv, delimiter=",")),
    ".tsv": Format(partial(_inspect_csv, delimiter="\t"), partial(_read_csv, delimiter="\t")),
    ".jsonl": Format(_inspect_json, _read_json),
}
