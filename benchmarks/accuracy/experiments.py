"""Trains and measures the models of the experiments on real text, one JSON each in ``benchmarks/results/accuracy``.

``python -m benchmarks.accuracy.experiments --model <all-MiniLM-L6-v2> --experiment methods``

A run whose JSON exists is skipped, and so is the training of a model that exists, so that an interrupted experiment
continues.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy import runs
from benchmarks.accuracy.robustness import noise_records
from benchmarks.accuracy.runs import RESULTS, USUAL, Budget, Run
from benchmarks.harness import Record
from earlyexit_kernels.tuning.report import write_json


@dataclass(frozen=True)
class Experiment:
    """Runs that are compared with each other.

    Attributes:
        tasks: each has a run of every plan.
        plans: method, its settings that are not the defaults, and their label in tables.
        records: ``run -> records``.
        budget: of every run.
    """

    tasks: tuple[str, ...]
    plans: tuple[tuple[str, Mapping[str, Any], str], ...]
    records: Callable[[Run], list[Record]] = runs.own_rule_records
    budget: Budget = USUAL


#: SmartBERT's gates are soft for 3 of 5 epochs in its paper; here, for the same share of three.
SMARTBERT = ("smartbert", {"soft_epochs": 1.8}, "")
EXPERIMENTS = {
    # every training method under one budget; DACT fixes its speed in training, so each point needs its own model
    "methods": Experiment(
        ("sst2", "trec"),
        (
            *((method, {}, "") for method in ("joint", "palbert", "ensemble", "deebert", "berxit", "fastbert")),
            SMARTBERT,
            ("dact", {}, "ponder 0.01"),
            *(("dact", {"ponder": ponder}, f"ponder {ponder:g}") for ponder in (0.03, 0.1)),
        ),
    ),
    # PALBERT's Lambda layers, by what they read and their depth
    "lambda_ablation": Experiment(
        ("sst2",),
        tuple(
            ("palbert", reads | depth, f"{reads.get('halting_input', 'concat')}, {depth.get('halting_layers', 3)}")
            for reads in ({}, {"halting_input": "diff"}, {"halting_input": "single"})
            for depth in ({"halting_layers": 1}, {})
        ),
    ),
    # skips, exits, and both on small tasks: SmartBERT's paper reports that entropy alone saves little there
    "smartbert": Experiment(("rte", "wnli"), (SMARTBERT,), runs.skip_records, Budget(train_rows=None, holdout=150)),
    "robustness": Experiment(("sst2",), (("joint", {}, ""),), noise_records),
}


def planned(name: str, model: str, trained: Path) -> Iterator[Run]:
    """Yield the runs of an experiment.

    Args:
        name: of `EXPERIMENTS`.
        model: folder or hub name of the encoder.
        trained: folder for the trained models, which experiments share.
    """
    experiment = EXPERIMENTS[name]
    for task in experiment.tasks:
        for method, settings, label in experiment.plans:
            yield Run(name, task, method, settings, label, model, trained, experiment.budget)


def write(run: Run, results: Path) -> None:
    """Measure a run and write its JSON, unless it exists."""
    path = results / f"{run.name}.json"
    if path.exists():
        print(f"skipped, exists: {path}", flush=True)
        return
    start = time.monotonic()
    records = EXPERIMENTS[run.experiment].records(run)
    fields = {"arguments": asdict(run.budget) | {"model": "/".join(Path(run.model).parts[-2:])}}
    fields |= {"run": run.fields(), "recipe": asdict(run.recipe())}
    seconds = round(time.monotonic() - start)
    print(f"wrote {write_json(path, records, **fields, seconds=seconds)} after {seconds} s", flush=True)


def main() -> None:
    """Run the experiments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="folder or hub name of the encoder")
    add("--experiment", choices=EXPERIMENTS, action="append", help="default: all")
    add("--trained", type=Path, default=Path("trained"), help="folder for the trained models (default: %(default)s)")
    add("--results", type=Path, default=RESULTS, help="folder for the JSON (default: benchmarks/results/accuracy)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    for name in args.experiment or EXPERIMENTS:
        for run in planned(name, args.model, args.trained):
            write(run, args.results)


if __name__ == "__main__":
    main()
