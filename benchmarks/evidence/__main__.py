"""Train and measure the models of the experiments, one JSON each in ``benchmarks/results/evidence``.

``python -m benchmarks.evidence --encoder sentence-transformers/all-MiniLM-L6-v2``

A training whose JSON exists is skipped, so that an interrupted run continues where it stopped. ``--list`` shows what is
left and trains nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import harness
from benchmarks.evidence import plans
from benchmarks.evidence.encoders import make_encoders
from benchmarks.evidence.measure import measure
from benchmarks.evidence.plans import EXPERIMENTS, Training
from earlyexit_cli import build_parser
from earlyexit_kernels.cli.recipe import Recipe
from earlyexit_kernels.cli.train import run as train
from earlyexit_kernels.tuning.report import environment, markdown_table, write_text

RESULTS = harness.RESULTS / "evidence"


def left_table(results: Path) -> str:
    """Return a table of the trainings that are done and left, by experiment."""
    rows = []
    for name, experiment in EXPERIMENTS.items():
        done = sum(result_file(training, results).is_file() for training in experiment.trainings)
        rows.append((name, experiment.claim, len(experiment.trainings), done, len(experiment.trainings) - done))
    return markdown_table(("experiment", "claim", "trainings", "done", "left"), rows)


def result_file(training: Training, results: Path = RESULTS) -> Path:
    """Return the file of a training's records."""
    return results / f"{training.name}.json"


def groups(trainings: Sequence[Training], results: Path) -> list[tuple[Training, ...]]:
    """Return what is left, with trainings that start from the same model together, after it."""
    found: dict[str, list[Training]] = {}
    for training in trainings:
        if not result_file(training, results).is_file():
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
        with _logged(work / f"{training.name}.log"):
            records = measure(work / training.name, noise=training.noise)
        seconds = {"training": round(trained - started), "measuring": round(time.monotonic() - trained)}
        write(training, records, seconds, work, results)
        done.append(training.name)
    for training in (*group, *(training.start for training in group if training.start)):
        shutil.rmtree(work / training.name, ignore_errors=True)
    return done


def train_once(training: Training, model: str, work: Path) -> None:
    """Train a model unless its folder exists."""
    folder = work / training.name
    if (folder / "earlyexit_task.json").is_file():
        return
    with _logged(work / f"{training.name}.log"):
        train(build_parser().parse_args(training.arguments(model, str(folder))))


@contextlib.contextmanager
def _logged(path: Path):  # type: ignore[no-untyped-def]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        yield


def write(
    training: Training, records: Sequence[harness.Record], seconds: dict[str, int], work: Path, results: Path
) -> None:
    """Write the records of a training, one on a line."""
    recipe = asdict(Recipe.load(work / training.name))
    head = {
        "name": training.name,
        "command": " ".join(["earlyexit", *training.arguments("ENCODER", "OUTPUT")]),
        "method": recipe["method"],
        "seconds": seconds,
        "environment": environment(),
    }
    lines = ",\n".join(json.dumps(record) for record in records)
    fields = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items())
    write_text(result_file(training, results), f'{{{fields},\n"records": [\n{lines}\n]}}\n')


def main() -> None:
    """Run what is left of the experiments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--encoder",
        default="sentence-transformers/all-MiniLM-L6-v2",
        help="folder or hub name of a six-layer BERT (default: %(default)s)",
    )
    add("--only", choices=EXPERIMENTS, action="append", default=[], help="experiment to run (default: all)")
    add("--jobs", type=int, default=os.cpu_count(), help="processes of one thread each (default: one a core)")
    add("--work", type=Path, default=Path("trained"), help="folder for models and logs (default: %(default)s)")
    add("--results", type=Path, default=RESULTS, help="folder for the JSON (default: benchmarks/results/evidence)")
    add("--list", action="store_true", help="show what is left, and stop")
    args = parser.parse_args()
    print(left_table(args.results))
    if args.list:
        return
    left = groups(tuple(plans.all_trainings(tuple(args.only)).values()), args.results)
    encoders = make_encoders(args.encoder, args.work / "encoders")
    context = multiprocessing.get_context("spawn")
    with (
        tqdm(total=sum(map(len, left)), desc="trainings") as bar,
        ProcessPoolExecutor(args.jobs, mp_context=context) as pool,
    ):
        running = [pool.submit(run_group, group, encoders, args.work, args.results) for group in left]
        for future in as_completed(running):
            for name in future.result():
                bar.write(f"measured {name}")
                bar.update()
    print(left_table(args.results))


if __name__ == "__main__":
    main()
