"""Train and measure some of the models, and keep what their exits answer."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks import glue
from benchmarks.evidence import plans
from benchmarks.evidence.measure import measure
from benchmarks.evidence.plans import Training
from earlyexit_cli import main
from earlyexit_kernels.cli.saved import RECORD


def groups(trainings: Sequence[Training], results: Path) -> list[tuple[Training, ...]]:
    """Return what is left, with trainings that start from the same model together, after it."""
    found: dict[str, list[Training]] = {}
    for training in trainings:
        if not (results / f"{training.name}.npz").is_file():
            first = training.start or training
            found.setdefault(first.name, []).append(training)
    return [tuple(group) for group in found.values()]


def run_group(group: Sequence[Training], encoders: dict[str, str], work: Path, results: Path) -> list[str]:
    """Train and measure some models in this process on one thread; return their names."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    done = []
    for training in group:
        start = training.start
        if start is not None:
            train_once(start, encoders[start.encoder], work)
        model = encoders[training.encoder] if start is None else str(work / start.name)
        started = time.monotonic()
        train_once(training, model, work)
        trained = time.monotonic()
        seconds = {"training": round(trained - started)}
        with _logged(work / f"{training.name}.log"):
            measure(training, work / training.name, rows_of(training, work)["reporting"], seconds).save(results)
        done.append(training.name)
    for training in (*group, *(training.start for training in group if training.start)):
        shutil.rmtree(work / training.name, ignore_errors=True)
    return done


def train_once(training: Training, model: str, work: Path) -> None:
    """Train a model unless its folder exists."""
    folder = work / training.name
    if (folder / RECORD).is_file():
        return
    with _logged(work / f"{training.name}.log"):
        files = rows_of(training, work)["train"].parent
        if main(training.arguments(model, str(folder), str(files))):
            raise RuntimeError(f"{training.name} could not be trained; its log is in {work}")


def rows_of(training: Training, work: Path) -> dict[str, Path]:
    """Return the files of a training's rows, as `glue.write_files` does."""
    folder = work / "rows" / training.files
    return glue.write_files(
        training.task, folder, rows=plans.ROWS[training.task], holdout=plans.HOLDOUT, seed=training.seed
    )


@contextlib.contextmanager
def _logged(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        yield
