"""Shared parts of the experiments: training as `earlyexit train` does, settings near a speed-up, and the JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
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
from earlyexit_kernels.tuning.sweep import Point, collect_trace, nearest_speed_up, outcome
from earlyexit_kernels.types import ExitTrace

RESULTS = harness.RESULTS / "accuracy"
#: Layer speed-ups at which methods are compared.
SPEED_UPS = (1.5, 2.0)
#: Share of the epochs with soft gates in SmartBERT, 3 of 5 in its paper.
SOFT_SHARE = 0.6
ARGUMENTS_FILE = "train_arguments.json"


@dataclass(frozen=True)
class Run:
    """One model to train and to measure.

    Attributes:
        experiment, task, method, seed: name the JSON.
        settings: of the method, if they are not its defaults.
        label: of the settings, for tables.
    """

    experiment: str
    task: str
    method: str
    settings: Mapping[str, Any]
    seed: int = 0
    label: str = ""

    @property
    def model_name(self) -> str:
        """Name of the trained model's folder, which experiments share."""
        words = [f"{key}-{_short(value)}" for key, value in self.settings.items()]
        return "-".join([self.task, self.method, *words, f"seed{self.seed}"])

    @property
    def name(self) -> str:
        """Name of the JSON."""
        return f"{self.experiment}-{self.model_name}"


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def add_arguments(parser: argparse.ArgumentParser, *, train_rows: int | None = None, holdout: int = 1000) -> None:
    """Add the arguments of every experiment that trains."""
    add = parser.add_argument
    add("--model", required=True, help="folder or hub name of the encoder")
    add("--pooling", default="mean", help="what exits read (default: %(default)s)")
    add("--trained", type=Path, default=Path("trained"), help="folder for the trained models (default: %(default)s)")
    add("--results", type=Path, default=RESULTS, help="folder for the JSON (default: benchmarks/results/accuracy)")
    add("--threads", type=int, default=1, help="(default: %(default)s)")
    add("--train-rows", type=int, default=train_rows, help="rows to train on, where there are as many (%(default)s)")
    add("--holdout", type=int, default=holdout, help="train rows that settings are chosen on (default: %(default)s)")
    add("--epochs", type=float, default=3.0, help="of a phase that trains the encoder (default: %(default)s)")
    add("--frozen-epochs", type=float, default=3.0, help="of a phase that freezes it (default: %(default)s)")
    add("--lr", type=float, default=5e-5, help="peak rate of the encoder (default: %(default)s)")
    add("--head-lr", type=float, default=1e-3, help="peak rate of the exits (default: %(default)s)")
    add("--batch-size", type=int, default=32, help="(default: %(default)s)")
    add("--points", type=int, default=24, help="settings of a rule with a threshold (default: %(default)s)")
    add("--seed", type=int, nargs="+", default=[0], help="one run for each (default: 0)")
    add("--set", action="append", default=[], metavar="METHOD.KEY=VALUE", help="a setting of a method, repeatable")


def settings_of(args: argparse.Namespace, method: str, **settings: Any) -> dict[str, Any]:
    """Return a method's settings without its defaults; those of the command line win."""
    if method == "smartbert":
        settings = {"soft_epochs": round(SOFT_SHARE * args.epochs, 6), **settings}
    given = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    given += [text.removeprefix(f"{method}.") for text in args.set if text.startswith(f"{method}.")]
    default, changed = (objective_from(method, found).to_dict() for found in ([], given))
    return {key: value for key, value in changed.items() if value != default[key]}


def train_arguments(run: Run, args: argparse.Namespace, train_rows: int) -> list[str]:
    """Return the arguments of `earlyexit train` for a run, without the folder."""
    given = [f"{key}={json.dumps(value)}" for key, value in run.settings.items()]
    phases = objective_from(run.method, given).phases
    epochs = [args.epochs if "backbone" in phase.trains else args.frozen_epochs for phase in phases]
    return [
        *("train", "--model", args.model, "--task", run.task, "--method", run.method, "--pooling", args.pooling),
        *("--train-rows", str(train_rows), "--holdout", str(args.holdout), "--seed", str(run.seed)),
        *("--lr", str(args.lr), "--head-lr", str(args.head_lr), "--batch-size", str(args.batch_size)),
        *("--epochs", *map(str, epochs)),
        *(word for text in given for word in ("--set", text)),
    ]


def trained_model(run: Run, args: argparse.Namespace) -> Path:
    """Return the folder of a run's model, trained unless it exists.

    Raises:
        ValueError: it exists, but was trained with other arguments.
    """
    folder: Path = args.trained / run.model_name
    available = len(load_task(run.task, seed=run.seed).split("train")) - args.holdout
    rows = available if args.train_rows is None else min(args.train_rows, available)
    arguments = train_arguments(run, args, rows)
    note = folder / ARGUMENTS_FILE
    if (folder / RECIPE_FILE).is_file():
        if json.loads(note.read_text(encoding="utf-8")) != arguments:
            raise ValueError(f"{folder} was trained with other arguments, see {note}; give another --trained")
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(arguments, indent=1) + "\n", encoding="utf-8")
    train(build_parser().parse_args([*arguments, "--output", str(folder)]))
    return folder


class Trained:
    """A trained model, its task and its tokenizer.

    Args:
        folder: written by `earlyexit train`.
        batch_size: of every pass.
    """

    def __init__(self, folder: Path, batch_size: int = 32) -> None:
        self.recipe = Recipe.load(folder)
        self.task: Task = load_task(self.recipe.task, seed=self.recipe.seed)
        self.model = load_model(folder, self.task)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.passing: dict[str, Any] = {
            "collate_fn": DataCollatorWithPadding(self.tokenizer),
            "batch_size": batch_size,
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


def swept(folder: Path, args: argparse.Namespace) -> Evaluation:
    """Return the sweep of `earlyexit eval`."""
    options = argparse.Namespace(batch_size=args.batch_size, drop=0.0, points=args.points)
    return evaluate(folder, Recipe.load(folder), options)


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


def own_rule_records(run: Run, args: argparse.Namespace) -> list[Record]:
    """Train a run's model, sweep it, and measure the method's own rule, with skips if it has them."""
    folder = trained_model(run, args)
    evaluation, model = swept(folder, args), Trained(folder, args.batch_size)
    points = [p for p in evaluation.result.points[evaluation.rule] if p.criterion.skip_from != NEVER_SKIP]
    return [*sweep_records(evaluation), *answer_records(model), *near_records(model, points)]


def noted(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments for the JSON, with paths cut to their last two parts: the rest depends on the machine."""
    kept = {name: value for name, value in vars(args).items() if name not in ("trained", "results")}
    if "model" in kept:
        kept["model"] = Path(kept["model"])
    return {k: "/".join(v.parts[-2:]) if isinstance(v, Path) else v for k, v in kept.items()}


def write_runs(runs: Iterable[Run], args: argparse.Namespace, records: Any = own_rule_records) -> None:
    """Run every run that has no JSON yet.

    Args:
        runs: of one experiment.
        args: of its command line.
        records: ``(run, args) -> records``.
    """
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    for run in runs:
        harness.write_once(args.results / f"{run.name}.json", partial(_document, run, args, records))


def _document(run: Run, args: argparse.Namespace, records: Any) -> tuple[list[Record], Record]:
    found = records(run, args)
    recipe = asdict(Recipe.load(args.trained / run.model_name))
    return found, {"arguments": noted(args), "run": asdict(run), "recipe": recipe}
