"""Sweep every criterion over a trained early-exit model: choose on held-out train rows, report on the dev split.

Prints tables; --output writes every point as JSON, --plot draws score against mean exit layer.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from earlyexit_kernels.cli.train import Recipe
from earlyexit_kernels.criteria import Criterion
from earlyexit_kernels.model import EarlyExitForSequenceClassification
from earlyexit_kernels.report import markdown_table, plot_tradeoff, write_json
from earlyexit_kernels.sweep import Sweep, collect_trace, sweep
from earlyexit_kernels.tasks import encode, load_task


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `earlyexit eval`."""
    add = parser.add_argument
    add("--model", required=True, type=Path, help="folder written by `earlyexit train`")
    add("--task", default=None, help="default: the task it was trained on")
    add("--drop", type=float, default=0.0, help="loss of the score allowed when choosing (default: %(default)s)")
    add("--points", type=int, default=24, help="settings of a criterion with a threshold (default: %(default)s)")
    add("--batch-size", type=int, default=32, help="(default: %(default)s)")
    add("--output", type=Path, default=None, help="JSON file to write")
    add("--plot", type=Path, default=None, help="PNG file to write")


def run(args: argparse.Namespace) -> int:
    """Trace both splits, sweep, print, and write what was asked for."""
    if not args.model.is_dir():
        raise FileNotFoundError(f"--model: expected a folder written by `earlyexit train`, {args.model} isn't one")
    recipe = Recipe.load(args.model)
    if args.task is not None:
        recipe = replace(recipe, task=args.task)
    torch.set_flush_denormal(True)
    task = load_task(recipe.task, seed=recipe.seed)
    model = AutoModelForSequenceClassification.from_pretrained(args.model, local_files_only=True)
    if not isinstance(model, EarlyExitForSequenceClassification):
        raise ValueError(f"--model: {args.model} holds a {type(model).__name__} without exits; train it first")
    if model.config.num_labels != task.num_labels:
        raise ValueError(
            f"--task: {task.name} has {task.num_labels} classes, the model in {args.model} {model.config.num_labels}"
        )
    tokenizer = AutoTokenizer.from_pretrained(args.model, local_files_only=True)
    _, held = recipe.part(task)
    if not len(held):
        raise ValueError("the model was trained without --holdout, so there are no rows to choose a threshold on")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    collate = DataCollatorWithPadding(tokenizer)
    tuning, reporting = (
        collect_trace(
            model,
            encode(split, tokenizer, max_length=recipe.max_length),
            collate_fn=collate,
            batch_size=args.batch_size,
            progress=name,
        )
        for name, split in (("tuning", held), ("reporting", task.split(task.evaluation)))
    )
    result = sweep(tuning, reporting, metrics=task.metrics, drop=args.drop, points=args.points, progress="sweep")
    print(
        f"Chosen on {len(held)} held-out train rows (score lost at most {args.drop:g}), reported on the "
        f"{task.evaluation} split of {task.name} ({len(reporting[1])} rows).\n"
    )
    print(layer_table(result), choice_table(result), sep="\n\n")
    if args.output is not None:
        arguments = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "debug"}
        print(f"\nEvery point: {write_json(args.output, result.records(), arguments=arguments)}")
    if args.plot is not None:
        print(f"\nCurve: {draw(result, args.plot, title=f'{task.name}, {task.evaluation} split')}")
    return 0


def setting(criterion: Criterion) -> str:
    """A criterion's numbers in words, e.g. ``threshold 0.35``."""
    values = {k: v for k, v in criterion.to_dict().items() if k != "name" and v is not None and v is not False}
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())


def layer_table(result: Sweep) -> str:
    """Static truncation: the score of each exit alone."""
    header = ("static truncation to layer", f"{result.metric} (reporting)", "layer speed-up", "layers saved")
    rows = [
        (k, f"{scores[result.metric]:.4f}", f"{result.depth / k:.2f}", f"{1 - k / result.depth:.0%}")
        for k, scores in enumerate(result.layers["reporting"], start=1)
    ]
    return markdown_table(header, rows)


def choice_table(result: Sweep) -> str:
    """Each criterion at its chosen setting, with random exit of the same mix."""
    metric = result.metric
    header = ("criterion", "chosen setting", metric, "mean exit layer", "layer speed-up", "layers saved", "random exit")
    full = result.layers["reporting"][-1][metric]
    rows = [("full depth", "", f"{full:.4f}", f"{result.depth:.2f}", "1.00", "0%", f"{full:.4f}")]
    for name in result.points:
        point = result.chosen(name)
        if point is None:
            rows.append((name, "none keeps the score", "", "", "", "", ""))
            continue
        o = point.reporting
        numbers = (f"{o.scores[metric]:.4f}", f"{o.mean_exit_layer:.2f}", f"{o.layer_speed_up:.2f}")
        rows.append((name, setting(point.criterion), *numbers, f"{o.layers_saved:.0%}", f"{o.random_exit:.4f}"))
    return markdown_table(header, rows)


def draw(result: Sweep, path: Path, *, title: str) -> Path:
    """The trade-off of every criterion, with static truncation and the random exits of the first criterion."""
    metric = result.metric
    curves = {
        name: [(p.reporting.mean_exit_layer, p.reporting.scores[metric]) for p in points]
        for name, points in result.points.items()
    }
    marked = {name: point.reporting for name in result.points if (point := result.chosen(name)) is not None}
    first = next(iter(result.points))
    baselines = {
        "static truncation": [(float(k + 1), scores[metric]) for k, scores in enumerate(result.layers["reporting"])],
        f"random exit, mix of {first}": [
            (p.reporting.mean_exit_layer, p.reporting.random_exit) for p in result.points[first]
        ],
    }
    return plot_tradeoff(
        path,
        curves,
        baselines=baselines,
        chosen={name: (o.mean_exit_layer, o.scores[metric]) for name, o in marked.items()},
        depth=result.depth,
        metric=metric,
        title=title,
    )
