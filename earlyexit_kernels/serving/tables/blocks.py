"""Blocks of a table, and the output folder: which blocks are finished, and which run they belong to."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from earlyexit_kernels.serving.source import Source
from earlyexit_kernels.serving.tables.files import Contents, File

#: Rows of a block.
BLOCK_ROWS = 50_000
#: Folders of the output: rows with an answer, rows without one, and files that are being written.
SCORED, ERRORS, PARTIAL = "scored", "errors", ".partial"
MANIFEST, LOCK = "manifest.json", ".lock"
#: Entry of the manifest -> what a message says if it is another one.
CHANGES = {"model": "model has changed", "options": "columns or other arguments have changed"}
#: Digits of the number of a file in the name of a block.
NUMBER = 6
#: Columns added to the rows with an answer, and to those without.
ADDED = (("label", pa.string()), ("score", pa.float64()), ("exit_layer", pa.int32()))
REASON = ("error", pa.string())
#: Files of a model that decide on the tokens.
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json")
#: What libraries raise for damaged files.
DAMAGED = (OSError, ValueError, TypeError, pa.ArrowException)


@dataclass(frozen=True)
class Block:
    """Rows `start` to `stop` of a file.

    Attributes:
        file: that has the rows.
        number: of the file among those of the run.
        schema: columns of the file.
        start, stop: rows, counted from 0; `stop` is the first one of the next block.
    """

    file: File
    number: int
    schema: pa.Schema
    start: int
    stop: int

    @property
    def name(self) -> str:
        """Name of its output; in the order of these names rows are in the order of the input."""
        stem = re.sub(r"[^A-Za-z0-9-]+", "_", os.path.splitext(os.path.basename(self.file.path))[0])[:80]
        return f"{self.number:0{NUMBER}d}-{stem}-{self.start:012d}.parquet"


def plan(files: Sequence[File], columns: Sequence[str], block_rows: int) -> tuple[list[Block], dict[str, str]]:
    """Return the blocks of files, and of each file that cannot be read its name and the reason.

    Args:
        files: of the input.
        columns: that each must have.
        block_rows: maximum rows of a block.

    Raises:
        ValueError: a column is missing, or has the name of one that is added.
    """
    blocks: list[Block] = []
    failed: dict[str, str] = {}
    with ThreadPoolExecutor(16) as threads:  # one after another, files of a bucket would take long
        inspected = list(threads.map(_inspected, files))
    for number, (file, found) in enumerate(zip(files, inspected, strict=True)):
        if isinstance(found, str):
            failed[file.name] = found
            continue
        _check_columns(file, found, columns)
        blocks += [
            Block(file, number, found.schema, start, min(start + block_rows, found.rows))
            for start in range(0, found.rows, block_rows)
        ]
    return blocks, failed


def _inspected(file: File) -> Contents | str:
    try:
        return file.format.inspect(file)
    except DAMAGED as error:
        return reason_of(error)


def reason_of(error: Exception) -> str:
    """Return what an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _check_columns(file: File, found: Contents, columns: Sequence[str]) -> None:
    names = found.schema.names
    missing = [name for name in columns if name not in names and found.rows]
    if missing:
        raise ValueError(f"--input: {file.name}: expected a column {missing[0]!r}, got {', '.join(names)}")
    doubled = [name for name, _ in (*ADDED, REASON) if name in names]
    if doubled:
        raise ValueError(
            f"--input: {file.name} has a column {doubled[0]!r}, which the answers would replace; rename it"
        )


def model_digest(folder: Path) -> str:
    """Return a digest of the config of a model, in which that of the weights stands, and of its tokenizer."""
    digest = hashlib.sha256(Source.of(folder, None).config_digest.encode())
    for path in sorted({path for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()}):
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


class Output:
    """The folder of a run.

    Args:
        folder: of the output; it need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def opened(self, run: dict[str, Any], *, overwrite: bool) -> Iterator[None]:
        """Check that the folder is that of this run, or new, and keep other processes out of it meanwhile.

        Args:
            run: ``{"model": ..., "options": ..., "inputs": {name: [size, mtime_ns]}}``, JSON-ready.
            overwrite: remove what another run has written.

        Raises:
            OSError: the folder cannot be written to, has other files, or another process writes to it.
            ValueError: it has rows of another run.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / LOCK).exists() and any(self.folder.iterdir()):
            raise FileExistsError(f"--output: expected a new folder, or that of an earlier run, got {self.folder}")
        with written(self.folder / LOCK):
            lock = (self.folder / LOCK).open("a")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system releases it when the process ends
            except BlockingIOError:
                raise OSError(f"--output: another process writes to {self.folder}; wait for its end") from None
            for name in (SCORED, ERRORS, PARTIAL) if overwrite else (PARTIAL,):
                if (self.folder / name).exists():
                    shutil.rmtree(self.folder / name)
            self._check(run)
            for name in (SCORED, ERRORS, PARTIAL):
                (self.folder / name).mkdir(exist_ok=True)
            with written(self.folder / MANIFEST):
                beside = self.folder / PARTIAL / MANIFEST
                beside.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
                beside.replace(self.folder / MANIFEST)
            yield
            shutil.rmtree(self.folder / PARTIAL, ignore_errors=True)

    def _check(self, run: dict[str, Any]) -> None:
        begun = {int(path.name[:NUMBER]) for path in (self.folder / SCORED).glob("*.parquet")}
        if not begun:
            return
        path = self.folder / MANIFEST
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            changed = [text for key, text in CHANGES.items() if before[key] != run[key]]
            old, new = before["inputs"], run["inputs"]
            if list(old) != list(new):
                changed.append("input files are others")
            changed += [
                f"file {name} has changed"
                for number, name in enumerate(new)
                if number in begun and name in old and old[name] != new[name]
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} cannot be read ({error}); give another --output, or --overwrite") from error
        if changed:
            raise ValueError(
                f"--output: {self.folder} has rows of an earlier run, since which the {changed[0]}; give another "
                "folder, or --overwrite"
            )

    def is_finished(self, block: Block) -> bool:
        """Return whether all rows of a block are written."""
        return (self.folder / SCORED / block.name).exists()

    def finish(self, block: Block, scored: TableWriter, errors: TableWriter) -> None:
        """Move the files of a block to their places; that with the answers comes last and says that it is finished."""
        if errors.rows:
            errors.close()
        else:  # what a run that was ended between the two moves has left
            with written(self.folder / ERRORS / block.name):
                (self.folder / ERRORS / block.name).unlink(missing_ok=True)
        scored.close()

    def rows(self, folder: str) -> int:
        """Return the number of rows in a folder of the output."""
        return sum(pa.parquet.read_metadata(path).num_rows for path in (self.folder / folder).glob("*.parquet"))


class TableWriter:
    """Writes a Parquet file: under another name until it is whole.

    Args:
        output: folder of the run.
        folder: `SCORED` or `ERRORS`.
        name: of the file.
        schema: of its tables.

    Attributes:
        rows: number of rows written.
    """

    def __init__(self, output: Path, folder: str, name: str, schema: pa.Schema) -> None:
        self.rows = 0
        self._target = output / folder / name
        with written(self._target):
            self._path = output / PARTIAL / f"{uuid.uuid4()}.parquet"
            self._file = self._path.open("xb")
            self._writer = pa.parquet.ParquetWriter(self._file, schema)

    def write(self, table: pa.Table) -> None:
        """Write some rows.

        Raises:
            DiskError: they cannot be written.
        """
        with written(self._target):
            self._writer.write_table(table)
        self.rows += table.num_rows

    def close(self) -> None:
        """Finish the file and give it its name.

        Raises:
            DiskError: it cannot be written.
        """
        with written(self._target):
            self._writer.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._path.replace(self._target)

    def drop(self) -> None:
        """Remove the file, if it has not been finished."""
        self._path.unlink(missing_ok=True)
        with suppress(OSError):  # what could not be written is to be dropped anyway
            self._writer.close()
            self._file.close()


class DiskError(OSError):
    """A file of the output cannot be written; those of the other blocks could not be either."""


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Add the path to the error of a failed write.

    Raises:
        DiskError: the reason that the system gives, with the path.
    """
    try:
        yield
    except OSError as error:
        raise DiskError(f"{path} could not be written: {error.strerror or error}") from error
