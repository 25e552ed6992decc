"""Write a page about a trained early-exit model, and its numbers as JSON."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from earlyexit_kernels.cli.evaluate import Traced, method_text, sweep_rules, trace_splits
from earlyexit_kernels.cli.inputs import queries_of
from earlyexit_kernels.cli.outputs import check_file, written
from earlyexit_kernels.cli.recipe import Recipe
from earlyexit_kernels.criteria import Criterion, FullDepth
from earlyexit_kernels.hf.predict import predict_with_exits
from earlyexit_kernels.tuning import report
from earlyexit_kernels.tuning.record import Calibration
from earlyexit_kernels.tuning.rows import Answers, Rows, exit_shares
from earlyexit_kernels.tuning.sweep import Sweep
from earlyexit_kernels.tuning.tables import environment, parameter_text, write_json, write_text

#: Number of thresholds tried for each rule, as `earlyexit eval` does unless told otherwise.
POINTS = 24


def run(args: argparse.Namespace) -> int:
    """Trace the model, sweep the rules, and write both files."""
    if not args.model.is_dir():
        raise FileNotFoundError(f"--model: expected a folder written by `earlyexit train`, {args.model} is not one")
    if find_spec("matplotlib") is None:
        raise ImportError("the charts of a report require matplotlib: `pip install matplotlib`")
    recipe, numbers = Recipe.load(args.model), args.output.with_suffix(".json")
    for file in (args.output, numbers):
        check_file("--output", file)
    torch.set_flush_denormal(True)
    found = trace_splits(args.model, recipe, task=None, dev=args.dev, batch_size=args.batch_size)
    drop = _saved_drop(found.model) if args.drop is None else args.drop
    result = sweep_rules(found, drop=drop, points=POINTS)
    data = report_data(args.model, recipe, found, result, texts=not args.no_texts)
    text = report.page(data)
    with written(numbers):
        write_json(numbers, result.records(), **data)
    with written(args.output):
        write_text(args.output, text)
    print(f"Report: {args.output}\nEvery number: {numbers}")
    return 0


def _saved_drop(model: Any) -> float:
    """Return the drop that the model was calibrated for; 0 without such a calibration."""
    calibration = Calibration.of(model)
    return 0.0 if calibration is None else calibration.target.get("drop", 0.0)


def report_data(folder: Path, recipe: Recipe, found: Traced, result: Sweep, *, texts: bool) -> dict[str, Any]:
    """Return the numbers of a report, JSON-ready.

    Args:
        folder: of the model.
        recipe: how it was trained.
        found: the model and its rows.
        result: sweep over these rows.
        texts: whether texts of rows are included.
    """
    model, task, split = found.model, found.task, found.splits["reporting"]
    trace, labels = found.traces["reporting"]
    rows = Rows(trace, np.asarray(labels), result.metric, task.problem_type, queries_of(split))
    source, criterion = described_criterion(model, result)
    answers = _answers(found, rows, criterion)
    lengths = [len(found.data["reporting"][row]["input_ids"]) for row in range(len(rows))]
    config: Any = model.config
    listed = report.first_and_last(rows, answers, split.sentences if texts else None, lengths, task.label_names)
    calibration = Calibration.of(model)
    return {
        "environment": environment(),
        "model": {
            "name": folder.resolve().name,
            "family": config.backbone_config.model_type,
            "depth": model.depth,
            "width": config.backbone_config.hidden_size,
            "method": method_text(recipe.method).removeprefix("method "),
            "task": task.name,
            "train_rows": recipe.train_rows,
            "tuning_rows": len(found.splits["tuning"]),
            **found.kinds,
        },
        "drop": result.drop,
        "summary": {
            **report.summary(rows, answers),
            "setting": parameter_text(criterion),
            "source": source,
            **_random(rows, answers),
        },
        "calibration": calibration.to_dict() if calibration is not None else None,
        "multiply_adds": report.multiply_adds(model, lengths, answers),
        "chance_level": report.chance_level(rows),
        "dead_share": report.DEAD_SHARE,
        "oracle": report.oracle(rows),
        "curves": report.curves(result, rows),
        "layers": report.by_layer(rows, answers),
        "histograms": report.histograms(rows, answers, lengths, task.label_names),
        "rows": {"texts": texts, **listed},
    }


def described_criterion(model: Any, result: Sweep) -> tuple[str, Criterion]:
    """Return the criterion that a report describes, and where it comes from ("model", "fastest" or "full_depth").

    That of the model; where it has none, the setting of all rules that is fastest on the tuning rows among those that
    lose at most `result.drop` there, else full depth.
    """
    if model.criterion is not None:
        return "model", model.criterion
    chosen = [point for name in result.points if (point := result.chosen(name)) is not None]
    fastest = min(chosen, key=lambda point: point.tuning.mean_layers_run, default=None)
    return ("full_depth", FullDepth()) if fastest is None else ("fastest", fastest.criterion)


def _answers(found: Traced, rows: Rows, criterion: Criterion) -> Answers:
    """Return the answers of a criterion on the reporting rows; one that skips layers requires a run of the model."""
    if criterion.skip_from is None:
        (answers,) = rows.replay([criterion])
        return answers
    before = found.model.criterion
    found.model.set_criterion(criterion)
    try:
        out = predict_with_exits(found.model, found.data["reporting"], **found.batching)
    finally:
        found.model.set_criterion(before)
    return Answers(criterion, out.logits, out.exit_layer, out.layers_run)


def _random(rows: Rows, answers: Answers) -> dict[str, float | None]:
    """Return the standard error of the score, and the score of random exit; None where layers are skipped."""
    skips = answers.criterion.skip_from is not None
    drawn = None if skips else rows.random_exit(exit_shares(answers.exit_layer, rows.trace.depth))
    return {"standard_error": rows.score_error(rows.predictions(answers)), "random_exit": drawn}
