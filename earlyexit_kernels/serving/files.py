"""Scoring the rows of many files into a folder: a file of the output for each unit of the input, and runs that go on.

Requires pyarrow (extra `ray`), and Ray where there are several workers.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import logging
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import torch

from earlyexit_kernels.serving.answers import ERROR, EXIT_LAYER, LABEL, SCORE
from earlyexit_kernels.serving.scorer import Scorer
from earlyexit_kernels.serving.source import Source
from earlyexit_kernels.serving.tables import DAMAGED, Unit, find_files, units_of

#: Columns that are added, and what their names begin with where the input has one of them.
ADDED = ((LABEL, pa.string()), (SCORE, pa.float64()), (EXIT_LAYER, pa.int32()), (ERROR, pa.string()))
PREFIX = "predicted_"
#: Names the model and the options of the rows in a folder.
RUN = "_run.json"
#: Entry in the footer of an output: which run and which state of its input it belongs to.
STAMP = b"earlyexit_stamp"
#: Files of a model that decide on the tokens.
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json")
#: How often a worker of Ray that has died is started again, and its unit tried again.
RETRIES = 3
#: Age in seconds after which a file that was being written belongs to no run.
OLD_SECONDS = 24 * 3600.0
#: Bytes of the object store of Ray, through which only messages go.
STORE_BYTES = 128 * 2**20


@dataclass(frozen=True)
class Job:
    """What a worker needs to know.

    Attributes:
        model: absolute path of its folder.
        output: absolute path of the output folder.
        columns: of the text and, for pairs, of the second text.
        max_length, truncate: as for `Scorer`.
        max_tokens: of a batch.
        modules: to import first, which register criteria of the user.
        run: digest of all of these on which answers depend.
    """

    model: str
    output: str
    columns: tuple[str, ...]
    max_length: int | None
    truncate: bool
    max_tokens: int
    modules: tuple[str, ...]
    run: str

    def stamp(self, unit: Unit) -> str:
        """Return the stamp of the output of a unit."""
        return json.dumps([self.run, unit.file, unit.size, unit.mtime_ns, unit.groups])


@dataclass(frozen=True)
class Done:
    """What became of a unit: rows written, those of them without an answer, or why its file cannot be read."""

    file: str
    rows: int = 0
    without: int = 0
    problem: str = ""


@dataclass(frozen=True)
class Plan:
    """What there is to do.

    Attributes:
        job: for the workers.
        files: number of files.
        units: without an output.
        finished: number of units that have one.
        problems: files that cannot be read.
    """

    job: Job
    files: int
    units: list[Unit]
    finished: int
    problems: list[Done]


def plan(
    model: Path,
    patterns: Sequence[str],
    output: Path,
    *,
    columns: tuple[str, ...],
    max_length: int | None,
    truncate: bool,
    max_tokens: int,
    modules: tuple[str, ...],
    overwrite: bool,
) -> Plan:
    """Find the units without an output, and note in the output folder which run its files belong to.

    Raises:
        OSError: the folder cannot be written to, or a pattern names no file.
        ValueError: the folder has rows of another model or other options, or an input has changed since its rows were
            scored.
    """
    options = {"columns": list(columns), "max_length": max_length, "truncate": truncate}
    run = {"model": _model_digest(model), **options}
    digest = hashlib.sha256(json.dumps(run).encode()).hexdigest()
    places = os.path.abspath(model), os.path.abspath(output)
    job = Job(*places, columns, max_length, truncate, max_tokens, modules, digest)
    files = find_files(patterns)
    with ThreadPoolExecutor(16) as threads:  # one after another, files of a bucket would take long
        inspected = list(threads.map(_inspected, files))
    _open(output, run, overwrite=overwrite)
    units = [unit for found in inspected if not isinstance(found, Done) for unit in found]
    left = []
    for unit in units:
        stamp = stamp_in(output / unit.name)
        if stamp is not None and stamp != job.stamp(unit):
            raise ValueError(
                f"INPUT: {unit.file} has changed since its rows were written to {output / unit.name}; give another "
                "--output, or --overwrite"
            )
        left += [unit] if stamp is None else []
    return Plan(
        job, len(files), left, len(units) - len(left), [found for found in inspected if isinstance(found, Done)]
    )


def _inspected(file: Unit) -> list[Unit] | Done:
    try:
        return units_of(file)
    except DAMAGED as error:
        return Done(file.file, problem=_reason_of(error))


def _reason_of(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _model_digest(folder: Path) -> str:
    """Return a digest of the config of a model, in which that of the weights stands, and of its tokenizer."""
    digest = hashlib.sha256(Source.of(folder, None).config_digest.encode())
    for path in sorted({path for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()}):
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _open(output: Path, run: dict[str, Any], *, overwrite: bool) -> None:
    """Make the folder that of this run, and remove what runs of another day have left half written."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / RUN
    if not path.exists() and any(output.iterdir()):
        raise FileExistsError(f"--output: expected a new folder, or that of an earlier run, got {output}")
    for old in output.glob(".*.parquet.*"):
        if time.time() - old.stat().st_mtime > OLD_SECONDS:
            old.unlink(missing_ok=True)
    if overwrite:
        path.unlink(missing_ok=True)
        for old in output.glob("*.parquet"):
            old.unlink()
    try:
        with path.open("x", encoding="utf-8") as file:
            json.dump(run, file, indent=1)
    except FileExistsError:
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            changed = [name for name in run if before[name] != run[name]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} cannot be read ({error}); give another --output, or --overwrite") from error
        if changed:
            raise ValueError(
                f"--output: {output} has rows of an earlier run with another {changed[0]}; give another folder, or "
                "--overwrite"
            ) from None


def stamp_in(path: Path) -> str | None:
    """Return the stamp of an output; None where there is none, or it is torn."""
    try:
        metadata = pa.parquet.read_schema(path).metadata or {}
    except DAMAGED:
        return None
    return metadata.get(STAMP, b"").decode()


class Worker:
    """Scores units with one copy of the model.

    Args:
        job: what to do.
        threads: of torch, or None for its default.
    """

    def __init__(self, job: Job, threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        for module in job.modules:
            importlib.import_module(module)
        self._job, self._output = job, Path(job.output)
        options: dict[str, Any] = {"max_length": job.max_length, "truncate": job.truncate, "max_tokens": job.max_tokens}
        self._scorer = Scorer(job.model, bad_rows="report", drift_window=None, **options)

    def __call__(self, row: dict[str, Unit]) -> dict[str, Any]:
        """Score the unit in a row of Ray Data, and return the fields of a `Done`.

        Raises:
            OSError: the output cannot be written.
        """
        return asdict(self.score(row["item"]))

    def score(self, unit: Unit) -> Done:
        """Score a unit and write its output, beside its place and then there.

        Raises:
            OSError: the output cannot be written.
        """
        target = self._output / unit.name
        if stamp_in(target) == self._job.stamp(unit):  # of a worker that died between the two
            return Done(unit.file, pa.parquet.read_metadata(target).num_rows)
        beside = self._output / f".{unit.name}.{uuid.uuid4()}"
        rows = without = 0
        tables = unit.tables()
        try:
            try:
                table = next(tables)
                names = self._names(table.schema)
            except DAMAGED as error:
                return Done(unit.file, problem=_reason_of(error))
            fields = [pa.field(name, kind) for name, (_, kind) in zip(names, ADDED, strict=True)]
            schema = pa.schema([*table.schema, *fields], metadata={STAMP: self._job.stamp(unit)})
            with _written(target), pa.parquet.ParquetWriter(beside, schema) as writer:
                while table is not None:
                    if table.num_rows:
                        answers = self._answers(table)
                        without += sum(map(bool, answers[-1].to_pylist()))
                        rows += table.num_rows
                        writer.write_table(pa.Table.from_arrays([*table.columns, *answers], schema=schema))
                    try:
                        table = next(tables, None)
                    except DAMAGED as error:
                        return Done(unit.file, problem=_reason_of(error))
            with _written(target):
                beside.replace(target)
            return Done(unit.file, rows, without)
        finally:
            beside.unlink(missing_ok=True)

    def _names(self, schema: pa.Schema) -> list[str]:
        """Return the names of the columns to add to those of an input.

        Raises:
            ValueError: a column is missing, or has the name of one that is added.
        """
        missing = [name for name in self._job.columns if name not in schema.names]
        if missing:
            raise ValueError(f"expected a column {missing[0]!r}, got {', '.join(schema.names)}")
        prefix = PREFIX if any(name in schema.names for name, _ in ADDED) else ""
        names = [f"{prefix}{name}" for name, _ in ADDED]
        doubled = [name for name in names if name in schema.names]
        if doubled:
            raise ValueError(f"has a column {doubled[0]!r}, which the answers would replace; rename it")
        return names

    def _answers(self, table: pa.Table) -> list[pa.Array]:
        """Return the columns of the answers to the rows of a table."""
        columns = [table.column(name).to_pylist() for name in self._job.columns]
        texts = columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))
        found = self._scorer(texts)
        number = self._scorer.model.config.id2label[0]
        found.setdefault(LABEL, [number] * len(texts))  # of regression: the name of the number
        return [pa.array(found[name], kind) for name, kind in ADDED]


@contextlib.contextmanager
def _written(path: Path) -> Iterator[None]:
    """Add the path to the error of a failed write."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path} could not be written: {error.strerror or error}") from error


def score_units(job: Job, units: Sequence[Unit], workers: int) -> Iterator[Done]:
    """Score units, and yield what becomes of each.

    Args:
        job: what to do.
        units: at least one.
        workers: copies of the model: one, in this process, or several of Ray, on this machine unless RAY_ADDRESS names
            a cluster.

    Raises:
        OSError: the output cannot be written, or workers died again and again.
    """
    if workers == 1:
        yield from map(Worker(job).score, units)
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    address = os.environ.get("RAY_ADDRESS", "local")
    here: dict[str, Any] = {"include_dashboard": False, "object_store_memory": STORE_BYTES}
    ours = not ray.is_initialized()
    if ours:
        ray.init(address, logging_level="ERROR", log_to_driver=False, **(here if address == "local" else {}))
    try:
        machine = ray.cluster_resources()
        threads = max(1, int(machine.get("CPU", 1)) // workers)
        needs: dict[str, Any] = {"num_gpus": 1} if machine.get("GPU") else {"num_cpus": threads}
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        found = ray.data.from_items(list(units), override_num_blocks=min(len(units), 8 * workers)).map(
            Worker,
            fn_constructor_args=(job, threads),
            compute=ray.data.ActorPoolStrategy(size=workers),
            max_restarts=RETRIES,
            max_task_retries=RETRIES,
            **needs,
        )
        yield from (Done(**row) for row in found.iter_rows())
    except (ray.exceptions.RayError, ray.exceptions.RayTaskError) as error:
        cause: BaseException = error
        while cause is not None and not isinstance(cause, OSError):
            cause = getattr(cause, "cause", None) or cause.__cause__  # type: ignore[assignment]
        begun = [u.file for u in units if any(Path(job.output).glob(f".{u.name}.*"))]
        at = f" at {begun[0]}" if begun else ""
        raise OSError(str(cause) if cause else f"workers of Ray died{at}: {_reason_of(error)[:300]}") from error
    finally:
        if ours:
            ray.shutdown()
