"""Files of a table: found by path, folder or pattern, cut into units of work, and read some thousand rows at a time.

Requires pyarrow (extra `ray`).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet

#: Rows that are held at a time, and of a unit of a Parquet file, if its row groups are not longer.
CHUNK_ROWS, UNIT_ROWS = 4096, 50_000
IS_PATTERN = re.compile(r"[*?\[]")
#: Options at the end of a URI, as in ``s3://bucket/rows?region=eu-west-1``.
URI_OPTIONS = re.compile(r"\?\w+=.*$")
#: What libraries raise for damaged files.
DAMAGED = (OSError, ValueError, TypeError, OverflowError, pa.ArrowException)


@dataclass(frozen=True)
class Unit:
    """The rows that one file of the output has: those of a file, or of some row groups of a Parquet file.

    Attributes:
        filesystem: of pyarrow, that has the file; it can be pickled.
        path: of the file in it.
        file: absolute path or URI, for messages.
        size, mtime_ns: of the file, in bytes and nanoseconds; 0 if not known.
        first: number of the first row.
        groups: row groups; empty for other formats.
    """

    filesystem: Any = field(repr=False, compare=False)
    path: str
    file: str
    size: int
    mtime_ns: int
    first: int = 0
    groups: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Name of its output, which follows from the path alone; rows of a file are in the order of these names."""
        stem = re.sub(r"[^A-Za-z0-9-]+", "_", os.path.splitext(os.path.basename(self.path))[0])[:80]
        return f"{stem}-{hashlib.sha256(self.file.encode()).hexdigest()[:8]}-{self.first:012d}.parquet"

    def tables(self) -> Iterator[pa.Table]:
        """Yield its rows, at most `CHUNK_ROWS` at a time; at least one table, for the columns.

        Raises:
            OSError, ValueError, TypeError, pyarrow.ArrowException: the file is damaged; see `DAMAGED`.
        """
        return FORMATS[_ending(self.path)](self)


def find_files(patterns: Sequence[str]) -> list[Unit]:
    """Return a unit for each file that paths, folders or patterns name, by their names.

    Args:
        patterns: local paths, or URIs that may end in options of pyarrow (``s3://bucket/rows?region=eu-west-1``).
            ``*``, ``?`` and ``[...]`` stand for characters within a name, ``**`` for folders. Of a folder, the files
            below it that end as a table does are taken; names that begin with ``.`` or ``_`` are left out.

    Raises:
        OSError: a pattern names no file, or the file system cannot be reached.
        ValueError: a URI of an unknown kind, or a file that does not end as a table does.
    """
    found: dict[str, Unit] = {}
    for pattern in patterns:
        files = list(_matching(pattern))
        if not files:
            raise FileNotFoundError(f"INPUT: expected files that end in {', '.join(FORMATS)}, {pattern} names none")
        found |= {unit.file: unit for unit in files}
    return [found[name] for name in sorted(found)]


def _matching(pattern: str) -> Iterator[Unit]:
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
        infos = list(_below(system, system.get_file_info(root), segments))
    except (pa.ArrowInvalid, OSError) as error:  # also of a bucket whose region cannot be asked for
        raise type(error)(f"INPUT: {pattern}: {error}") from error
    prefix = base.removesuffix(root)
    for info in infos:
        if info.type == pa.fs.FileType.Directory:
            inside = system.get_file_info(pa.fs.FileSelector(info.path, recursive=True))
            files = [one for one in inside if one.is_file and _ending(one.path) in FORMATS and not _hidden(info, one)]
        else:
            files = [info]
        for one in files:
            if _ending(one.path) not in FORMATS:
                raise ValueError(f"INPUT: expected files that end in {', '.join(FORMATS)}, got {prefix + one.path}")
            yield Unit(system, one.path, prefix + one.path, one.size, one.mtime_ns or 0)


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


def units_of(file: Unit) -> list[Unit]:
    """Return the units of a file: of a Parquet file whole row groups, of another one all of it.

    Raises:
        OSError, ValueError, TypeError, pyarrow.ArrowException: the file is damaged; see `DAMAGED`.
    """
    if _ending(file.path) != ".parquet":
        return [file]
    with file.filesystem.open_input_file(file.path) as stream:
        metadata = pa.parquet.ParquetFile(stream).metadata
        rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    parts: list[tuple[int, list[int]]] = [(0, [])]
    row = 0
    for group, count in enumerate(rows):
        if parts[-1][1] and row + count - parts[-1][0] > UNIT_ROWS:
            parts.append((row, []))
        parts[-1][1].append(group)
        row += count
    whole = (file.filesystem, file.path, file.file, file.size, file.mtime_ns)
    return [Unit(*whole, first, tuple(groups)) for first, groups in parts]


def _parquet(unit: Unit) -> Iterator[pa.Table]:
    with unit.filesystem.open_input_file(unit.path) as stream:
        file = pa.parquet.ParquetFile(stream)
        yield file.schema_arrow.remove_metadata().empty_table()
        for batch in file.iter_batches(CHUNK_ROWS, list(unit.groups)):
            yield pa.Table.from_batches([batch]).replace_schema_metadata()


def _csv(unit: Unit, *, delimiter: str) -> Iterator[pa.Table]:
    """Yield the rows of a CSV or TSV file, all of whose columns are texts, without quotes in TSV.

    The reader of pyarrow takes the rest of a file for one cell where a quote is not closed.
    """
    csv.field_size_limit(sys.maxsize)
    quoting: Any = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
    with unit.filesystem.open_input_stream(unit.path) as stream:
        lines = io.TextIOWrapper(io.BufferedReader(stream), encoding="utf-8-sig", newline="")
        reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
        names = next(reader, [])
        doubled = next((name for at, name in enumerate(names) if name in names[:at]), None)
        if doubled is not None:
            raise ValueError(f"expected different columns, got {doubled!r} twice")
        schema, rows = pa.schema([(name, pa.string()) for name in names]), list[list[str]]()
        yield schema.empty_table()
        try:
            for row in reader:
                if len(row) not in (0, len(names)):
                    raise ValueError(f"line {reader.line_num}: expected {len(names)} cells, got {len(row)}")
                rows += [row] if row else []  # a blank line
                if len(rows) == CHUNK_ROWS:
                    yield _columns(rows, schema)
                    rows = []
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num}: {error}") from error
        if rows:
            yield _columns(rows, schema)


def _columns(rows: Sequence[Sequence[str]], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_arrays([pa.array(column, pa.string()) for column in zip(*rows, strict=True)], schema=schema)


def _json(unit: Unit) -> Iterator[pa.Table]:
    """Yield the rows of a file of JSON lines, which is read twice: first for the columns and types of all rows."""
    schema = pa.schema([])
    for rows in _json_rows(unit):
        names = dict.fromkeys(name for row in rows for name in row)
        types = pa.schema([(name, pa.array([row.get(name) for row in rows]).type) for name in names])
        schema = pa.unify_schemas([schema, types], promote_options="permissive")
    yield schema.empty_table()
    for rows in _json_rows(unit):
        yield pa.Table.from_pylist(rows, schema=schema)


def _json_rows(unit: Unit) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    with io.BufferedReader(unit.filesystem.open_input_stream(unit.path), 2**20) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                rows.append(_json_row(number, line))
            if len(rows) == CHUNK_ROWS:
                yield rows
                rows = []
    if rows:
        yield rows


def _json_row(number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {number}: expected a JSON object ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"line {number}: expected a JSON object, got {type(row).__name__}")
    return row


#: Ending of the name -> what yields the rows of a unit.
FORMATS: dict[str, Callable[[Unit], Iterator[pa.Table]]] = {
    ".parquet": _parquet,
    ".csv": partial(_csv, delimiter=","),
    ".tsv": partial(_csv, delimiter="\t"),
    ".jsonl": _json,
}
