"""Sweep every criterion over trained early-exit models: choose on held-out train rows, report on the dev split."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from earlyexit_kernels.backends import working_device
from earlyexit_kernels.cli.inputs import (
    check_lengths,
    check_max_length,
    check_queries,
    check_vocabulary,
    loaded_from,
    metrics_for,
    queries_of,
)
from earlyexit_kernels.cli.outputs import check_file, check_plot, written
from earlyexit_kernels.cli.recipe import Recipe
from earlyexit_kernels.hf.model import EarlyExitForSequenceClassification
from earlyexit_kernels.methods import from_dict
from earlyexit_kernels.tasks.load import EncodedSplit, Task, encode
from earlyexit_kernels.tasks.own import listed
from earlyexit_kernels.tasks.sources import Split
from earlyexit_kernels.tuning.charts import plot_tradeoff
from earlyexit_kernels.tuning.settings import skip_settings
from earlyexit_kernels.tuning.sweep import Sweep, sweep, sweep_skipping
from earlyexit_kernels.tuning.tables import device_text, environment, markdown_table, parameter_text, write_json
from earlyexit_kernels.tuning.traces import collect_trace
from earlyexit_kernels.types import ExitTrace

#: Gate value from which layers are skipped, for methods without a `skip_threshold`.
SKIP_FROM = 0.5
NEVER_SKIP = 1.0


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of one model.

    Attributes:
        model: folder of the model.
        recipe: how it was trained.
        task: name of the task that it was evaluated on.
        rule: name of the exit rule from the method's paper.
        result: result of the sweep.
        title: the splits used, in one sentence.
        rows: number of rows of the reporting split.
        setup: device and dtype.
    """

    model: Path
    recipe: Recipe
    task: str
    rule: str
    result: Sweep
    title: str
    rows: int
    setup: str

    def records(self) -> list[dict[str, Any]]:
        """Return JSON-ready records, each with the folder of the model."""
        return [{"model": str(self.model), **record} for record in self.result.records()]


def run(args: argparse.Namespace) -> int:
    """Sweep each model, print the tables, and write the files asked for."""
    for folder in args.model:
        if not folder.is_dir():
            raise FileNotFoundError(f"--model: expected a folder written by `earlyexit train`, {folder} is not one")
    recipes = [Recipe.load(folder) for folder in args.model]
    plots = _plots(args.plot, len(recipes))
    for plot in plots:
        check_plot("--plot", plot)
    if args.output is not None:
        check_file("--output", args.output)
    torch.set_flush_denormal(True)
    done = []
    for number, (folder, recipe) in enumerate(zip(args.model, recipes, strict=True), start=1):
        found = evaluate(folder, recipe, args)
        done.append(found)
        print(f"{folder}, {method_text(recipe.method)}. {found.title}\n")
        print(layer_table(found.result), choice_table(found.result, found.rule), sep="\n\n")
        if found.rule in found.result.points:
            print("\n* exit rule from the method's paper")
        if plots:
            path = plots[number - 1]
            with written(path):
                title = f"{found.task}, {folder.name}\n{found.setup}"
                print(f"\nCurve: {draw(found.result, path, title=title, rows=found.rows)}")
        print()
    if args.output is not None:
        given = {k: _plain(v) for k, v in vars(args).items() if k != "debug"}
        models = [{"model": str(e.model), "rule": e.rule, "recipe": asdict(e.recipe), "task": e.task} for e in done]
        records = [record for e in done for record in e.records()]
        with written(args.output):
            print(f"Every point: {write_json(args.output, records, arguments=given, models=models)}")
    return 0


def _plots(path: Path | None, models: int) -> list[Path]:
    """Return one file per model."""
    if path is None or models == 1:
        return [] if path is None else [path]
    return [path.with_stem(f"{path.stem}-{number}") for number in range(1, models + 1)]


def method_text(method: dict[str, Any]) -> str:
    """Describe a training method by its name and the options that differ from the defaults."""
    own = from_dict({"name": method["name"]}).to_dict()
    changed = ", ".join(f"{key} {value}" for key, value in method.items() if own[key] != value)
    return f"method {method['name']}" + (f" ({changed})" if changed else "")


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


@dataclass(frozen=True)
class Traced:
    """A trained model with its rows and the outputs of all exits on them; the splits are "tuning" and "reporting".

    Attributes:
        model: the early-exit model.
        task: the task that it is evaluated on.
        splits: texts and labels, by split.
        kinds: what the rows are, by split, e.g. "held-out train rows".
        data: token ids, by split.
        traces: trace and labels ``[N]``, by split.
        batching: how rows are batched, as arguments of `collect_trace`.
        metrics: names of the scores, the first of which decides.
    """

    model: EarlyExitForSequenceClassification
    task: Task
    splits: dict[str, Split]
    kinds: dict[str, str]
    data: dict[str, EncodedSplit]
    traces: dict[str, tuple[ExitTrace, Any]]
    batching: dict[str, Any]
    metrics: tuple[str, ...]


def evaluate(folder: Path, recipe: Recipe, args: argparse.Namespace) -> Evaluation:
    """Trace both splits and sweep every rule.

    Raises:
        ValueError: as `trace_splits`.
    """
    found = trace_splits(folder, recipe, task=args.task, dev=args.dev, metrics=args.metric, batch_size=args.batch_size)
    result = sweep_rules(found, drop=args.drop, points=args.points)
    task, model, rows = found.task, found.model, {name: len(split) for name, split in found.splits.items()}
    title = (
        f"Chosen on {rows['tuning']} {found.kinds['tuning']} (score loss at most {args.drop:g}), reported on "
        f"{found.kinds['reporting']} ({rows['reporting']} rows)."
    )
    setup = f"{device_text(environment())}, {str(model.dtype).removeprefix('torch.')}"
    return Evaluation(folder, recipe, task.name, model.method.rule, result, title, rows["reporting"], setup)


def trace_splits(
    folder: Path,
    recipe: Recipe,
    *,
    task: str | None,
    dev: Path | None = None,
    metrics: Sequence[str] | None = None,
    batch_size: int,
) -> Traced:
    """Load a model and its rows, and trace the held-out rows and the reporting split.

    Args:
        folder: written by `earlyexit train`.
        recipe: of this folder.
        task: name of the task to evaluate on, or None for that of the recipe.
        dev: file with other rows, as for `Recipe.load_data`.
        metrics: as for `metrics_for`.
        batch_size: rows per batch.

    Raises:
        ValueError: not an early-exit model, other classes than the task's, a tokenizer that does not know the text, no
            held-out rows, or of a ranking no query to choose or to report on.
    """
    loaded = recipe.load_data(task=task, dev=dev)
    names = metrics_for(loaded, metrics)
    model = load_model(folder, loaded)
    tuning, reporting = recipe.both_rows(loaded)
    kinds = {"tuning": tuning[1], "reporting": reporting[1]}
    splits = {"tuning": tuning[0], "reporting": reporting[0]}
    check_queries({"choose on": tuning[0], "report on": reporting[0]})
    data, collate = encoded(folder, model, splits, max_length=recipe.max_length)
    batching: dict[str, Any] = {"collate_fn": collate, "batch_size": batch_size}
    traces = {name: collect_trace(model, rows, progress=name, **batching) for name, rows in data.items()}
    return Traced(model, loaded, splits, kinds, data, traces, batching, names)


def encoded(
    folder: Path, model: EarlyExitForSequenceClassification, splits: Mapping[str, Split], *, max_length: int | None
) -> tuple[dict[str, EncodedSplit], Callable]:
    """Return the token ids of splits by the tokenizer of a model's folder, and what pads a list of rows.

    Raises:
        ValueError: a tokenizer that does not know the text, or rows that are too long for the model.
    """
    with loaded_from(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    first = next(iter(splits))
    check_max_length(max_length, tokenizer, splits[first])
    data = {name: encode(split, tokenizer, max_length=max_length) for name, split in splits.items()}
    check_vocabulary(data[first], "train" if first == "tuning" else first, tokenizer, model, folder)
    check_lengths(data, model)
    return data, DataCollatorWithPadding(tokenizer)


def sweep_rules(found: Traced, *, drop: float, points: int) -> Sweep:
    """Replay every criterion and, if the model has gates, run the rules that skip layers; arguments as for `sweep`."""
    tuning, reporting = found.traces["tuning"], found.traces["reporting"]
    result = sweep(
        tuning,
        reporting,
        metrics=found.metrics,
        drop=drop,
        points=points,
        problem_type=found.task.problem_type,
        groups=(queries_of(found.splits["tuning"]), queries_of(found.splits["reporting"])),
        progress="sweep",
    )
    if "gate" in found.model.heads.aux_names:
        skip_from = found.model.method.to_dict().get("skip_threshold", SKIP_FROM)
        group = skip_settings(tuning[0], skip_from=(skip_from, NEVER_SKIP))
        data = found.data["tuning"], found.data["reporting"]
        result = sweep_skipping(found.model, result, group, *data, progress="skipping", **found.batching)
    return result


def load_model(folder: Path, task: Task) -> EarlyExitForSequenceClassification:
    """Load the early-exit model of a folder, on the GPU if there is one.

    Raises:
        ValueError: the folder contains another model, or one for other classes than the task's.
    """
    model = load_any(folder)
    labels = tuple(model.config.id2label[i] for i in range(model.config.num_labels))
    if labels != task.label_names:
        raise ValueError(
            f"--task: expected a task with the labels of the model in {folder}, {listed(labels)}; {task.name} has "
            f"{listed(task.label_names)}"
        )
    return model


def load_any(folder: Path) -> EarlyExitForSequenceClassification:
    """Load the early-exit model of a folder for any classes, on the GPU if there is one.

    Raises:
        ValueError: the folder contains another model.
    """
    with loaded_from(folder):
        model = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True)
    if not isinstance(model, EarlyExitForSequenceClassification):
        raise ValueError(
            f"--model: expected a model with exits, {folder} contains a {type(model).__name__}; train it first"
        )
    return model.to(working_device())


def layer_table(result: Sweep) -> str:
    """Return a table of static truncation: the score of each exit alone."""
    names = tuple(result.layers["reporting"][0])
    scored = tuple(f"{name} (reporting)" for name in names)
    header = ("static truncation to layer", *scored, "layer speed-up", "layers saved")
    rows = [
        (k, *(f"{scores[m]:.4f}" for m in names), f"{result.depth / k:.2f}", f"{1 - k / result.depth:.0%}")
        for k, scores in enumerate(result.layers["reporting"], start=1)
    ]
    return markdown_table(header, rows)


def choice_table(result: Sweep, rule: str | None = None) -> str:
    """Return a table of the criteria at their chosen settings, with random exit at the same exit shares.

    Args:
        result: result of the sweep.
        rule: name of the criterion to list first, marked with *.
    """
    metric = result.metric
    header = (
        "criterion",
        "chosen setting",
        metric,
        "mean exit layer",
        "mean layers run",
        "layer speed-up",
        "layers saved",
        "random exit",
    )
    full, depth = result.layers["reporting"][-1][metric], f"{result.depth:.2f}"
    rows: list[Sequence[str]] = [("full depth", "", f"{full:.4f}", depth, depth, "1.00", "0%", f"{full:.4f}")]
    for name in sorted(result.points, key=lambda name: name != rule):
        title, point = f"{name} *" if name == rule else name, result.chosen(name)
        if point is None:
            rows.append((title, "none keeps the score", *[""] * 6))
            continue
        o = point.reporting
        layers = (f"{o.mean_exit_layer:.2f}", f"{o.mean_layers_run:.2f}", f"{o.layer_speed_up:.2f}")
        random = "" if o.random_exit is None else f"{o.random_exit:.4f}"
        saved = f"{o.layers_saved:.0%}"
        rows.append((title, parameter_text(point.criterion), f"{o.scores[metric]:.4f}", *layers, saved, random))
    return markdown_table(header, rows)


def draw(result: Sweep, path: Path, *, title: str, rows: int | None = None) -> Path:
    """Plot the trade-off of every criterion, with static truncation and random exit for the first criterion."""
    metric = result.metric
    curves = {
        name: [(p.reporting.mean_layers_run, p.reporting.scores[metric]) for p in points]
        for name, points in result.points.items()
    }
    marked = {name: point.reporting for name in result.points if (point := result.chosen(name)) is not None}
    first = next(iter(result.points))
    baselines = {
        "static truncation": [(float(k + 1), scores[metric]) for k, scores in enumerate(result.layers["reporting"])],
        f"random exit, shares of {first}": [
            (p.reporting.mean_layers_run, p.reporting.random_exit)
            for p in result.points[first]
            if p.reporting.random_exit is not None
        ],
    }
    return plot_tradeoff(
        path,
        curves,
        baselines=baselines,
        chosen={name: (o.mean_layers_run, o.scores[metric]) for name, o in marked.items()},
        depth=result.depth,
        metric=metric,
        title=title,
        rows=rows,
    )
