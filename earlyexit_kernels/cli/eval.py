"""Measure the saved criterion and every rule on labelled rows; write a page about it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from earlyexit_kernels.cli.checks import check_queries, metrics_for, queries_of, written
from earlyexit_kernels.cli.saved import HELD_OUT, Saved, load_saved, unseen_rows
from earlyexit_kernels.criteria import Criterion, FullDepth
from earlyexit_kernels.data.rows import Split
from earlyexit_kernels.hf.predict import predict_with_exits
from earlyexit_kernels.methods import from_dict
from earlyexit_kernels.tuning import report
from earlyexit_kernels.tuning.calibrate import split_indices
from earlyexit_kernels.tuning.record import Calibration
from earlyexit_kernels.tuning.rows import Answers, Rows, exit_shares
from earlyexit_kernels.tuning.settings import skip_settings
from earlyexit_kernels.tuning.sweep import Sweep, sweep, sweep_skipping
from earlyexit_kernels.tuning.tables import environment, markdown_table, parameter_text, write_json, write_text
from earlyexit_kernels.tuning.traces import collect_trace
from earlyexit_kernels.types import ExitTrace

#: Gate value from which layers are skipped, for methods without a `skip_threshold`.
SKIP_FROM = 0.5
NEVER_SKIP = 1.0
#: Settings tried for each rule.
POINTS = 24


@dataclass(frozen=True)
class Traced:
    """A saved model with rows and the outputs of all exits on them; the splits are "tuning" and "reporting".

    Attributes:
        saved: the model.
        splits: texts and labels, by split.
        kinds: what the rows are, by split, e.g. "held-out rows".
        data: token ids, by split.
        traces: trace and labels ``[N]``, by split.
        metrics: names of the scores, the first of which decides.
        batch_size: rows per batch.
    """

    saved: Saved
    splits: dict[str, Split]
    kinds: dict[str, str]
    data: dict[str, list[Any]]
    traces: dict[str, tuple[ExitTrace, Any]]
    metrics: tuple[str, ...]
    batch_size: int

    @property
    def batching(self) -> dict[str, Any]:
        """How rows are batched, as arguments of `collect_trace`."""
        return {"collate_fn": self.saved.collate, "batch_size": self.batch_size}

    @property
    def problem_type(self) -> str:
        """As in transformers."""
        return self.saved.labels.problem_type

    def rows(self, split: str) -> Rows:
        """Return the rows of a split, with the deciding metric."""
        trace, labels = self.traces[split]
        return Rows(trace, np.asarray(labels), self.metrics[0], self.problem_type, queries_of(self.splits[split]))


def run(args: argparse.Namespace) -> int:
    """Trace the model, print what it reaches, and write the files asked for."""
    torch.set_flush_denormal(True)
    saved = load_saved(args.model)
    splits, kinds = evaluation_splits(args, saved)
    found = trace_splits(saved, splits, kinds, metrics=args.metric, batch_size=args.batch_size)
    drop = _saved_drop(saved.model) if args.drop is None else args.drop
    result = sweep_rules(found, drop=drop)
    print(
        f"{args.model}, {method_text(saved.model.method.to_dict())}, on {len(splits['reporting'])} {kinds['reporting']}"
    )
    print(f"\n{_saved_line(found)}\n")
    print(layer_table(result), end="\n\n")
    print(
        f"Every rule, its setting chosen on {len(splits['tuning'])} {kinds['tuning']} (loss of {found.metrics[0]} at "
        f"most {drop:g}):\n"
    )
    print(choice_table(result, saved.model.method.rule))
    if saved.model.method.rule in result.points:
        print("\n* exit rule from the method's paper")
    if args.output is not None:
        arguments = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "debug"}
        with written(args.output):
            write_json(args.output, result.records(), arguments=arguments, model=str(args.model))
        print(f"\nEvery setting: {args.output}")
    if args.report is not None:
        data = report_data(found, result, texts=args.texts)
        numbers, text = args.report.with_suffix(".json"), report.page(data)
        with written(numbers):
            write_json(numbers, result.records(), **data)
        with written(args.report):
            write_text(args.report, text)
        print(f"\nReport: {args.report}\nEvery number of it: {numbers}")
    return 0


def evaluation_splits(args: argparse.Namespace, saved: Saved) -> tuple[dict[str, Split], dict[str, str]]:
    """Return rows to choose settings on ("tuning") and others to report on ("reporting"), and what they are.

    Rows of --data are reported on, all of them where the model has rows of its own to choose on. Without them, and
    without --data, the rows are divided as `earlyexit calibrate` divides them, so that what it chose is measured on
    other rows.

    Raises:
        FileNotFoundError, ValueError: as for `unseen_rows`, or too few rows to divide.
    """
    rows, kind = unseen_rows(args, saved)
    kept = saved.folder / HELD_OUT
    if args.data is not None and kept.is_file() and saved.record is not None:
        own = saved.read(kept, saved.record.columns)
        return {"tuning": own, "reporting": rows}, {"tuning": saved.record.unseen, "reporting": kind}
    if len(rows) < 2:
        raise ValueError(f"expected rows to choose on and rows to report on, got {len(rows)} of {kind}")
    parts = split_indices(len(rows), groups=rows.groups or None)
    tuning, reporting = (rows.take(part.tolist()) for part in parts)
    return {"tuning": tuning, "reporting": reporting}, {"tuning": kind, "reporting": f"other {kind}"}


def trace_splits(
    saved: Saved,
    splits: Mapping[str, Split],
    kinds: Mapping[str, str],
    *,
    metrics: Sequence[str] | None = None,
    batch_size: int = 32,
) -> Traced:
    """Run all layers over both splits.

    Args:
        saved: the model.
        splits, kinds: of `evaluation_splits`.
        metrics: as for `metrics_for`.
        batch_size: rows per batch.

    Raises:
        ValueError: a metric that the rows do not have, a tokenizer that does not know the text, or of a ranking no
            query to choose or to report on.
    """
    names = metrics_for(saved.labels, bool(splits["reporting"].groups), metrics)
    check_queries({"choose on": splits["tuning"], "report on": splits["reporting"]})
    data = {name: saved.encoded(split) for name, split in splits.items()}
    batching: dict[str, Any] = {"collate_fn": saved.collate, "batch_size": batch_size}
    traces = {name: collect_trace(saved.model, rows, progress=name, **batching) for name, rows in data.items()}
    return Traced(saved, dict(splits), dict(kinds), data, traces, names, batch_size)


def sweep_rules(found: Traced, *, drop: float, points: int = POINTS) -> Sweep:
    """Replay every criterion and, if the model has gates, run the rules that skip layers; arguments as for `sweep`."""
    tuning, reporting = found.traces["tuning"], found.traces["reporting"]
    model = found.saved.model
    result = sweep(
        tuning,
        reporting,
        metrics=found.metrics,
        drop=drop,
        points=points,
        problem_type=found.problem_type,
        groups=(queries_of(found.splits["tuning"]), queries_of(found.splits["reporting"])),
        progress="sweep",
    )
    if "gate" in model.heads.aux_names:
        skip_from = model.method.to_dict().get("skip_threshold", SKIP_FROM)
        group = skip_settings(tuning[0], skip_from=(skip_from, NEVER_SKIP))
        data = found.data["tuning"], found.data["reporting"]
        result = sweep_skipping(model, result, group, *data, progress="skipping", **found.batching)
    return result


def method_text(method: dict[str, Any]) -> str:
    """Describe a training method by its name and the options that differ from the defaults."""
    own = from_dict({"name": method["name"]}).to_dict()
    changed = ", ".join(f"{key} {value}" for key, value in method.items() if own[key] != value)
    return f"method {method['name']}" + (f" ({changed})" if changed else "")


def _saved_line(found: Traced) -> str:
    """Say what the criterion saved with the model reaches on the reporting rows."""
    criterion = found.saved.model.criterion
    if criterion is None:
        return f"No criterion is saved with it; earlyexit calibrate {found.saved.folder} --max-drop 0.005 chooses one."
    rows = found.rows("reporting")
    answers = _answers(found, rows, criterion)
    now = rows.scores(found.metrics, answers.logits)
    full = rows.scores(found.metrics, rows.trace.logits[:, -1].numpy())
    scores = ", ".join(f"{name} {now[name]:.4f} (full depth {full[name]:.4f})" for name in found.metrics)
    layers = f"mean exit layer {answers.exit_layer.mean():.2f} of {rows.trace.depth}"
    return f"Saved criterion {criterion}: {scores}, {layers}."


def layer_table(result: Sweep) -> str:
    """Return a table of the score of each exit alone."""
    names = tuple(result.layers["reporting"][0])
    rows = [
        (k, *(f"{scores[m]:.4f}" for m in names), f"{result.depth / k:.2f}", f"{1 - k / result.depth:.0%}")
        for k, scores in enumerate(result.layers["reporting"], start=1)
    ]
    return markdown_table(("all rows leave at layer", *names, "layer speed-up", "layers saved"), rows)


def choice_table(result: Sweep, rule: str | None = None) -> str:
    """Return a table of the criteria at their chosen settings, with random exit at the same exit shares.

    Args:
        result: result of the sweep.
        rule: name of the criterion to list first, marked with *.
    """
    metric = result.metric
    header = ("criterion", "setting", metric, "mean exit layer", "mean layers run", "layer speed-up", "random exit")
    full, depth = result.layers["reporting"][-1][metric], f"{result.depth:.2f}"
    rows: list[Sequence[str]] = [("full depth", "", f"{full:.4f}", depth, depth, "1.00", f"{full:.4f}")]
    for name in sorted(result.points, key=lambda name: name != rule):
        title, point = f"{name} *" if name == rule else name, result.chosen(name)
        if point is None:
            rows.append((title, "none keeps the score", *[""] * 5))
            continue
        o = point.reporting
        layers = (f"{o.mean_exit_layer:.2f}", f"{o.mean_layers_run:.2f}", f"{o.layer_speed_up:.2f}")
        random = "" if o.random_exit is None else f"{o.random_exit:.4f}"
        rows.append((title, parameter_text(point.criterion), f"{o.scores[metric]:.4f}", *layers, random))
    return markdown_table(header, rows)


def _saved_drop(model: Any) -> float:
    """Return the drop that the model was calibrated for; 0 without such a calibration."""
    calibration = Calibration.of(model)
    return 0.0 if calibration is None else calibration.target.get("drop", 0.0)


def report_data(found: Traced, result: Sweep, *, texts: bool) -> dict[str, Any]:
    """Return the numbers of a report, JSON-ready.

    Args:
        found: the model and its rows.
        result: sweep over these rows.
        texts: whether texts of rows are included.
    """
    model, labels_of, split = found.saved.model, found.saved.labels, found.splits["reporting"]
    rows = found.rows("reporting")
    source, criterion = described_criterion(model, result)
    answers = _answers(found, rows, criterion)
    lengths = [len(found.data["reporting"][row]["input_ids"]) for row in range(len(rows))]
    config: Any = model.config
    record = found.saved.record
    listed = report.first_and_last(rows, answers, split.texts if texts else None, split.rows, lengths, labels_of.names)
    calibration = Calibration.of(model)
    return {
        "environment": environment(),
        "model": {
            "name": found.saved.folder.resolve().name,
            "family": config.backbone_config.model_type,
            "depth": model.depth,
            "width": config.backbone_config.hidden_size,
            "method": method_text(model.method.to_dict()).removeprefix("method "),
            "task": "other data" if record is None else record.data,
            "train_rows": "unknown" if record is None else record.rows,
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
        "histograms": report.histograms(rows, answers, lengths, labels_of.names),
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
    before = found.saved.model.criterion
    found.saved.model.set_criterion(criterion)
    try:
        out = predict_with_exits(found.saved.model, found.data["reporting"], **found.batching)
    finally:
        found.saved.model.set_criterion(before)
    return Answers(criterion, out.logits, out.exit_layer, out.layers_run)


def _random(rows: Rows, answers: Answers) -> dict[str, float | None]:
    """Return the standard error of the score, and the score of random exit; None where layers are skipped."""
    skips = answers.criterion.skip_from is not None
    drawn = None if skips else rows.random_exit(exit_shares(answers.exit_layer, rows.trace.depth))
    return {"standard_error": rows.score_error(rows.predictions(answers)), "random_exit": drawn}
