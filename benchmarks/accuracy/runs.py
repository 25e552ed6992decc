"""A run of an experiment: training as `earlyexit train` does, and records of settings near a speed-up."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, DataCollatorWithPadding

from benchmarks import harness
from benchmarks.harness import Record
from earlyexit_cli import build_parser
from earlyexit_kernels.cli.evaluate import NEVER_SKIP, Evaluation, evaluate, load_model
from earlyexit_kernels.cli.recipe import RECIPE_FILE, Recipe
from earlyexit_kernels.cli.train import objective_from
from earlyexit_kernels.cli.train import run as train
from earlyexit_kernels.criteria import RULES, Criterion, from_dict
from earlyexit_kernels.hf.predict import predict_with_exits
from earlyexit_kernels.tasks.load import EncodedSplit, Task, encode, load_task
from earlyexit_kernels.tasks.sources import Split
from earlyexit_kernels.tuning.flops import encoder_macs, row_macs
from earlyexit_kernels.tuning.metrics import score
from earlyexit_kernels.tuning.sweep import Point, nearest_speed_up, outcome
from earlyexit_kernels.tuning.traces import collect_trace
from earlyexit_kernels.types import ExitTrace

RESULTS = harness.RESULTS / "accuracy"
#: Layer speed-ups at which methods are compared.
SPEED_UPS = (1.5, 2.0)
ARGUMENTS_FILE = "train_arguments.json"
#: Settings that were the defaults of methods when the committed runs were made, where these have changed since.
FORMER_DEFAULTS: dict[str, dict[str, Any]] = {
    "palbert": {"prior": 0.1},
    "dact": {"start": None},
    "smartbert": {"gate_bias": 0.0},
}


@dataclass(frozen=True)
class Budget:
    """What every model of an experiment is trained and measured with.

    Attributes:
        train_rows: rows to train on, where there are as many; None is all.
        holdout: train rows that settings are chosen on.
        epochs, frozen_epochs: of a phase that trains the encoder, and of one that freezes it.
        lr, head_lr: peak rates of the encoder, and of the exits and gates.
        batch_size: rows of a batch.
        points: settings of a rule with a threshold.
    """

    train_rows: int | None = 10_000
    holdout: int = 1000
    epochs: float = 3.0
    frozen_epochs: float = 3.0
    lr: float = 5e-5
    head_lr: float = 1e-3
    batch_size: int = 32
    points: int = 24


USUAL = Budget()


@dataclass(frozen=True)
class Run:
    """One model to train and to measure.

    Attributes:
        experiment, task, method: name the JSON.
        settings: of the method, if they are not its defaults.
        label: of the settings, for tables.
        model: folder or hub name of the encoder.
        trained: folder for the trained models, which experiments share.
        budget: for training and measuring.
    """

    experiment: str
    task: str
    method: str
    settings: Mapping[str, Any]
    label: str
    model: str
    trained: Path
    budget: Budget = USUAL

    @property
    def folder(self) -> Path:
        """Folder of the trained model."""
        words = [f"{key}-{value}" for key, value in self.settings.items()]
        return self.trained / "-".join([self.task, self.method, *words, "seed0"])

    @property
    def name(self) -> str:
        """Name of the JSON."""
        return f"{self.experiment}-{self.folder.name}"

    def fields(self) -> Record:
        """Return the fields that identify the run in its JSON."""
        names = ("experiment", "task", "method", "settings", "label")
        return {name: getattr(self, name) for name in names} | {"seed": 0}

    def recipe(self) -> Recipe:
        """Return what the trained model was made of."""
        return Recipe.load(self.folder)


def train_arguments(run: Run, train_rows: int) -> list[str]:
    """Return the arguments of `earlyexit train` for a run, without the folder."""
    budget = run.budget
    settings = FORMER_DEFAULTS.get(run.method, {}) | dict(run.settings)
    given = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    phases = objective_from(run.method, given).phases
    epochs = [budget.epochs if "backbone" in phase.trains else budget.frozen_epochs for phase in phases]
    return [
        *("train", "--model", run.model, "--task", run.task, "--method", run.method, "--pooling", "mean"),
        *("--train-rows", str(train_rows), "--holdout", str(budget.holdout), "--seed", "0"),
        *("--lr", str(budget.lr), "--head-lr", str(budget.head_lr), "--gate-lr", str(budget.head_lr)),
        *("--batch-size", str(budget.batch_size)),
        *("--epochs", *map(str, epochs)),
        *(word for text in given for word in ("--set", text)),
    ]


def train_once(run: Run) -> None:
    """Train a run's model, unless it exists.

    Raises:
        ValueError: it exists, but was trained with other arguments.
    """
    available = len(load_task(run.task).split("train")) - run.budget.holdout
    rows = available if run.budget.train_rows is None else min(run.budget.train_rows, available)
    arguments, note = train_arguments(run, rows), run.folder / ARGUMENTS_FILE
    if (run.folder / RECIPE_FILE).is_file():
        if json.loads(note.read_text(encoding="utf-8")) != arguments:
            raise ValueError(f"{run.folder} was trained with other arguments, see {note}; give another --trained")
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(arguments, indent=1) + "\n", encoding="utf-8")
    train(build_parser().parse_args([*arguments, "--output", str(run.folder)]))


class Trained:
    """A run's model, trained unless it exists, its task and its tokenizer."""

    def __init__(self, run: Run) -> None:
        train_once(run)
        self.run, self.recipe = run, run.recipe()
        self.task: Task = load_task(self.recipe.task, seed=self.recipe.seed)
        self.model = load_model(run.folder, self.task)
        self.tokenizer = AutoTokenizer.from_pretrained(run.folder, local_files_only=True)
        self.passing: dict[str, Any] = {
            "collate_fn": DataCollatorWithPadding(self.tokenizer),
            "batch_size": run.budget.batch_size,
        }

    @property
    def reporting(self) -> Split:
        """Split to report on."""
        return self.task.split(self.task.evaluation)

    @property
    def held_out(self) -> Split:
        """Train rows that settings are chosen on."""
        return self.recipe.train_splits(self.task)[1]

    def encoded(self, split: Split) -> EncodedSplit:
        """Return a split in tokens."""
        return encode(split, self.tokenizer, max_length=self.recipe.max_length)

    def measure(self, criterion: Criterion | None) -> dict[str, Any]:
        """Run the model over the reporting split; return its scores, layers, and multiply-adds.

        These count exits and gates; `macs_share` is 1 for the encoder at full depth without any.
        """
        data = self.encoded(self.reporting)
        self.model.set_criterion(criterion)
        out = predict_with_exits(self.model, data, **self.passing)
        lengths = torch.tensor([len(data[row]["input_ids"]) for row in range(len(data))])
        costs = row_macs(self.model, lengths, out.exit_layer, out.layers_run)
        bare = float(encoder_macs(self.model, lengths).sum())
        return {
            "scores": score(self.task.metrics, out.logits, np.asarray(out.labels)),
            "mean_exit_layer": float(out.exit_layer.mean()),
            "mean_layers_run": float(out.layers_run.mean()),
            "macs_share": float(costs.total.sum()) / bare,
            "macs_share_exits": float(costs.exits.sum()) / bare,
            "macs_share_gates": float(costs.gates.sum()) / bare,
        }


def swept(run: Run) -> Evaluation:
    """Return the sweep of `earlyexit eval`."""
    options = argparse.Namespace(
        task=None, dev=None, metric=None, batch_size=run.budget.batch_size, drop=0.0, points=run.budget.points
    )
    return evaluate(run.folder, run.recipe(), options)


def near_records(model: Trained, points: Iterable[Point], **fields: Any) -> list[Record]:
    """Return the setting nearest to each of `SPEED_UPS` on held-out rows, replayed and run on the other split."""
    found = [(target, nearest_speed_up(tuple(points), target)) for target in SPEED_UPS]
    return [
        {"kind": "near", "target": target, **fields, **point.to_dict(), "measured": model.measure(point.criterion)}
        for target, point in found
    ]


def sweep_records(evaluation: Evaluation) -> list[Record]:
    """Return every truncation, and every point of the method's own rule."""
    return [
        record
        for record in evaluation.result.records()
        if record["kind"] != "point" or record["criterion"]["name"] == evaluation.rule
    ]


def answer_records(model: Trained) -> list[Record]:
    """Return truncation to every layer for methods whose answer combines exits, as DACT's does."""
    data = model.model.objective.answering()
    if data is None or data["name"] not in RULES:
        return []
    rule, passing = from_dict(data), {"metrics": model.task.metrics, "problem_type": model.task.problem_type}
    trace, labels = collect_trace(model.model, model.encoded(model.reporting), **model.passing)
    found = []
    for layer in range(1, trace.depth + 1):
        aux = {name: values[:, :layer] for name, values in trace.aux.items()}
        part = ExitTrace(trace.logits[:, :layer], aux, trace.keys)
        scores = outcome(part, labels, rule, **passing).scores
        found.append({"kind": "answer_truncation", "layer": layer, "reporting": scores})
    return found


def own_rule_records(run: Run) -> list[Record]:
    """Sweep a run's model, and measure the method's own rule at each speed-up, with skips if it has them."""
    model, evaluation = Trained(run), swept(run)
    points = [p for p in evaluation.result.points[evaluation.rule] if p.criterion.skip_from != NEVER_SKIP]
    return [*sweep_records(evaluation), *answer_records(model), *near_records(model, points)]


def skip_records(run: Run) -> list[Record]:
    """Measure the most frequent class, full depth, skips alone, exits alone, and skips and exits at each speed-up."""
    model, evaluation = Trained(run), swept(run)
    labels = model.reporting.labels
    fixed = {"full depth": None, "skips alone": from_dict(model.model.objective.answering())}
    found: list[Record] = [{"kind": "majority", "share": Counter(labels).most_common(1)[0][1] / len(labels)}]
    for name, criterion in fixed.items():
        found.append({"kind": "fixed", "rule": name, "measured": model.measure(criterion)})
    points = evaluation.result.points
    skipping = [p for p in points["skip_gate"] if p.criterion.skip_from != NEVER_SKIP]
    found += near_records(model, points["entropy"], rule="exits alone")
    found += near_records(model, skipping, rule="skips and exits")
    return [*sweep_records(evaluation), *found]
