"""Actors of Ray that score the blocks of a table. Requires ray and pyarrow (extra `ray`)."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from earlyexit_kernels.serving.answers import ERROR, EXIT_LAYER, LABEL, SCORE
from earlyexit_kernels.serving.ray_session import ray_session
from earlyexit_kernels.serving.scorer import Scorer
from earlyexit_kernels.serving.tables.blocks import (
    ADDED,
    DAMAGED,
    ERRORS,
    REASON,
    SCORED,
    Block,
    DiskError,
    Output,
    TableWriter,
    reason_of,
)

#: Workers of a machine at most, as each holds the weights.
MOST_WORKERS = 8
#: How often a worker that has died, as when memory is exhausted, is started again.
RESTARTS = 3
#: Workers that one block may lose for good, after which the run ends.
LOSSES = 2


@dataclass(frozen=True)
class Job:
    """What a worker needs to know.

    Attributes:
        model: absolute path of its folder.
        output: absolute path of the output folder.
        columns: of the text and, for pairs, of the second text.
        options: of the `Scorer`.
        threads: of torch.
    """

    model: str
    output: str
    columns: tuple[str, ...]
    options: dict[str, Any]
    threads: int


class BlockScorer:
    """Scores blocks with one copy of the model.

    Args:
        job: what to do.
    """

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        self._job = job
        self._output = Output(Path(job.output))
        self._scorer = Scorer(job.model, bad_rows="report", drift_window=None, **job.options)

    def score(self, block: Block) -> str:
        """Score a block and write its files.

        Returns:
            an empty string, or why the file of the block cannot be read.

        Raises:
            DiskError: the output cannot be written.
        """
        folder = self._output.folder
        scored = TableWriter(folder, SCORED, block.name, pa.schema([*block.schema, *map(_field, ADDED)]))
        errors = TableWriter(folder, ERRORS, block.name, pa.schema([*block.schema, _field(REASON)]))
        try:
            tables = block.file.format.read(block.file, block.schema, block.start, block.stop)
            while True:
                try:
                    table = next(tables, None)
                except DAMAGED as error:
                    return reason_of(error)
                if table is None:
                    break
                good, bad = self._answered(table)
                scored.write(good)
                errors.write(bad)
            if scored.rows + errors.rows != block.stop - block.start:
                return "its rows have changed since it was first read"
            self._output.finish(block, scored, errors)
            return ""
        finally:
            scored.drop()
            errors.drop()

    def _answered(self, table: pa.Table) -> tuple[pa.Table, pa.Table]:
        """Return the rows with an answer and the rows without one, each with their columns."""
        columns = [table.column(name).to_pylist() for name in self._job.columns]
        texts = columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))
        found = self._scorer(texts)
        number = self._scorer.model.config.id2label[0]
        found.setdefault(LABEL, [number] * len(texts))  # of regression: the name of the number
        errors = pa.array(found[ERROR], pa.string())
        bad = pa.array([bool(error) for error in found[ERROR]], pa.bool_())
        good = pa.array([not error for error in found[ERROR]], pa.bool_())
        answers = table
        for (name, kind), column in zip(ADDED, (LABEL, SCORE, EXIT_LAYER), strict=True):
            answers = answers.append_column(pa.field(name, kind), pa.array(found[column], kind))
        return answers.filter(good), table.append_column(_field(REASON), errors).filter(bad)


def _field(column: tuple[str, Any]) -> Any:
    return pa.field(*column)


def shares(cores: Sequence[int], workers: int | None, blocks: int) -> tuple[int, int]:
    """Return the number of workers and the threads of each, so that all cores have work.

    Args:
        cores: of each machine.
        workers: as many as asked for; None: one a core, but at most `MOST_WORKERS` on the smallest machine.
        blocks: there are no more workers than these.

    Raises:
        ValueError: more workers than cores.
    """
    total, least = sum(cores), min(cores)
    if workers is None:
        threads = -(-least // MOST_WORKERS)
        workers = sum(one // threads for one in cores)
    if workers > total:
        raise ValueError(f"--workers: expected at most {total}, one a core, got {workers}")
    workers = min(workers, blocks)
    threads = min(least, total // workers)
    while sum(one // threads for one in cores) < workers:
        threads -= 1
    return workers, threads


def score_blocks(
    blocks: Sequence[Block], job: dict[str, Any], *, workers: int | None, address: str | None
) -> Iterator[tuple[Block, str]]:
    """Yield blocks as they are finished, and an empty string or why the file cannot be read.

    Args:
        blocks: to score; at least one.
        job: fields of a `Job`, without `threads`.
        workers: number of actors; None: as `shares` says, or one a GPU.
        address: of a cluster of Ray; None: this machine.

    Raises:
        ConnectionError: there is no cluster at the address.
        DiskError: the output cannot be written.
        OSError: no worker is left, or one block lost `LOSSES` of them.
        ValueError: more workers than cores or GPUs.
    """
    with ray_session(address):
        import ray

        machines = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        gpus = int(sum(machine.get("GPU", 0) for machine in machines))
        if gpus:
            if (workers or 0) > gpus:
                raise ValueError(f"--workers: expected at most {gpus}, one a GPU, got {workers}")
            needs, workers, threads = {"num_cpus": 1, "num_gpus": 1}, min(workers or gpus, len(blocks)), 1
        else:
            workers, threads = shares([int(machine["CPU"]) for machine in machines], workers, len(blocks))
            needs = {"num_cpus": threads}
        actor = ray.remote(max_restarts=RESTARTS, max_task_retries=RESTARTS, **needs)(BlockScorer)
        pool = [actor.remote(Job(**job, threads=threads)) for _ in range(workers)]
        yield from _distributed(blocks, pool)


def _distributed(blocks: Sequence[Block], pool: Sequence[Any]) -> Iterator[tuple[Block, str]]:
    """Give each actor a block, and another one when it is finished; the block of a lost actor goes to the next one."""
    import ray

    waiting, idle, lost = deque(blocks), deque(pool), Counter[str]()
    running: dict[Any, tuple[Any, Block]] = {}
    while waiting or running:
        while waiting and idle:
            actor, block = idle.popleft(), waiting.popleft()
            running[actor.score.remote(block)] = actor, block
        (ready,), _ = ray.wait(list(running), num_returns=1)
        actor, block = running.pop(ready)
        try:
            problem = ray.get(ready)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, DiskError):
                raise error.cause from None
            raise
        except ray.exceptions.RayActorError as error:
            lost[block.name] += 1
            if not (running or idle) or lost[block.name] == LOSSES:
                at = f"{block.file.name}, rows from {block.start}"
                raise OSError(f"a worker died at {at}: {reason_of(error)}") from error
            waiting.appendleft(block)
            continue
        idle.append(actor)
        yield block, problem
