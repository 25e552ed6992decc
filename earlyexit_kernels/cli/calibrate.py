"""Choose a criterion for a target on rows that the model was not trained on, and save it with the model."""

from __future__ import annotations

import argparse
import json
import shlex
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from earlyexit_kernels.cli.card import README, renewed
from earlyexit_kernels.cli.checks import metrics_for, queries_of, written
from earlyexit_kernels.cli.saved import Saved, load_saved, unseen_rows
from earlyexit_kernels.hf.saving import CONFIG, saved_whole
from earlyexit_kernels.tuning.calibrate import calibrate
from earlyexit_kernels.tuning.record import Calibration
from earlyexit_kernels.tuning.settings import MIN_POINTS, rule_names, settings
from earlyexit_kernels.tuning.tables import markdown_table, parameter_text, write_json
from earlyexit_kernels.tuning.targets import Latency, MaxDrop, Risk, SpeedUp, Target, UnreachableTargetError
from earlyexit_kernels.tuning.traces import collect_trace

AUTO = "auto"
#: Target -> which setting of all rules `auto` is.
AUTO_REASONS: dict[type[Target], str] = {
    MaxDrop: "of all settings within the drop on the tuning rows, and not beyond it on the check rows by more than a "
    "standard error, it runs the fewest layers",
    SpeedUp: "of all settings that are fast enough on the tuning rows it is the slowest within one standard error of "
    "the highest score",
    Latency: "of all settings within the latency it is the slowest within one standard error of the highest score",
    Risk: "of all settings that pass the tests it runs the fewest layers",
}
RISK_NOTE = (
    "The guarantee does not hold for a criterion that is chosen by this table, whose risks are those of the check rows"
)


def run(args: argparse.Namespace) -> int:
    """Print a table of every criterion for the target, and save the best or the one asked for."""
    target = target_from(args)
    saved = load_saved(args.model)
    rows, kind = unseen_rows(args, saved)
    queries, labels = queries_of(rows), saved.labels
    metric = metrics_for(labels, queries is not None, args.metric and [args.metric], predictions_only=True)[0]
    allowed = rule_names(saved.model.heads.aux_names, labels.problem_type)
    if args.criterion not in (AUTO, *allowed):
        raise ValueError(
            f"--criterion: expected auto or a criterion of this model, {', '.join(allowed)}; got {args.criterion}"
        )
    data = saved.encoded(rows)
    batching: dict[str, Any] = {"collate_fn": saved.collate, "batch_size": args.batch_size}
    trace, truth = collect_trace(saved.model, data, progress=kind, **batching)
    choose = partial(
        calibrate, target=target, metric=metric, problem_type=labels.problem_type, groups=queries, **batching
    )
    of_model = partial(choose, saved.model, data, temperature=args.temperature)
    # measured, or with other exits: on the model
    of_rows = of_model if isinstance(target, Latency) else partial(choose, trace, truth)
    rules = list(settings(trace, points=MIN_POINTS, problem_type=labels.problem_type))
    if args.temperature:
        rules, of_rows = [], of_model
    reached, missed = _each(rules, of_rows)
    print(f"{args.model}, {target}: chosen on half of {len(rows)} {kind}, checked on the other half\n")
    if reached:
        print(result_table(reached, target, metric, trace.depth), end="\n\n")
    for name, nearest in missed.items():
        print(f"{name} cannot reach the target; the nearest is {nearest}")
    if args.output is not None:
        _write(args, reached, missed)
    with warnings.catch_warnings():
        warnings.simplefilter("default" if args.temperature else "ignore")  # else printed with the table
        chosen = None if args.per_layer else reached.get(args.criterion)
        if chosen is None:  # raises for a rule that cannot reach the target
            chosen = of_rows(criterion=args.criterion, per_layer=args.per_layer)
    if args.criterion == AUTO:
        print(f"\nauto chose {chosen.criterion.name}: {AUTO_REASONS[type(target)]}")
    if args.dry_run:
        print(f"\nNot saved, as --dry-run is given:\n\n{chosen}")
        if isinstance(target, Risk):
            print(f"\n{RISK_NOTE}")
        return 0
    _save(saved, chosen, with_exits=args.temperature)
    print(f"\nSaved in {args.model}:\n\n{chosen}")
    folder = shlex.quote(str(args.model))
    print(f"\nNext: earlyexit eval {folder} --report report.html, or earlyexit predict {folder} new.csv --output FILE")
    return 0


def target_from(args: argparse.Namespace) -> Target:
    """Return the target that the arguments name.

    Raises:
        ValueError: an option of another target, or a value out of range.
    """
    options = {"latency_batch_size": args.latency_ms, "epsilon": args.risk, "against": args.risk}
    for name, of_target in options.items():
        if getattr(args, name) is not None and of_target is None:
            needed = "--latency-ms" if name == "latency_batch_size" else "--risk"
            raise ValueError(f"--{name.replace('_', '-')}: expected beside {needed}")
    if args.max_drop is not None:
        return MaxDrop(args.max_drop)
    if args.speed_up is not None:
        return SpeedUp(args.speed_up)
    if args.latency_ms is not None:
        return Latency(args.latency_ms, args.latency_batch_size or 1)
    return Risk(args.risk, args.epsilon or Risk.epsilon, args.against or Risk.against)


def _each(rules: Sequence[str], choose: Callable[..., Calibration]) -> tuple[dict[str, Calibration], dict[str, str]]:
    """Return the calibration of each rule, and the nearest setting of those that cannot reach the target."""
    reached, missed = {}, {}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for name in rules:
            try:
                reached[name] = choose(criterion=name)
            except UnreachableTargetError as error:
                missed[name] = error.nearest
    for message in dict.fromkeys(str(warning.message) for warning in told):
        print(f"warning: {message}\n")
    return reached, missed


def result_table(found: Mapping[str, Calibration], target: Target, metric: str, depth: int) -> str:
    """Return a table of the calibrations, fastest first, on the check rows."""
    header = ["criterion", "setting", metric, "full depth", "drop", "drop, 95 %", "mean exit layer", "layer speed-up"]
    more = {
        "risk": [f"risk (at most {getattr(target, 'delta', 0):g})"],
        "latency": ["ms a batch", "full depth, ms"],
    }.get(target.name, [])
    rows = []
    for name, one in sorted(found.items(), key=lambda item: item[1].mean_exit_layer):
        low, high = one.drop_interval
        cells = [name, parameter_text(one.criterion), f"{one.score:.4f}", f"{one.full_depth:.4f}", f"{one.drop:.4f}"]
        cells += [f"{low:.4f} to {high:.4f}", f"{one.mean_exit_layer:.2f} of {depth}", f"{one.layer_speed_up:.2f}"]
        cells += [f"{one.guarantee.risk:.4f}"] if one.guarantee is not None else []
        cells += [f"{ms:.2f}" for ms in (one.latency, one.full_depth_latency) if ms is not None]
        rows.append(cells)
    return markdown_table([*header, *more], rows)


def _write(args: argparse.Namespace, reached: Mapping[str, Calibration], missed: Mapping[str, str]) -> None:
    records: list[dict[str, Any]] = [{"rule": name, "calibration": one.to_dict()} for name, one in reached.items()]
    records += [{"rule": name, "nearest": nearest} for name, nearest in missed.items()]
    arguments = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "debug"}
    with written(args.output):
        print(f"\nEvery criterion: {write_json(args.output, records, arguments=arguments)}")


def _save(saved: Saved, chosen: Calibration, *, with_exits: bool) -> None:
    """Save a criterion with the model, all files of it or none.

    Args:
        saved: the model in its folder.
        chosen: the calibration.
        with_exits: whether the exits have changed too; else only the config and the card are written, so that the
            digest of the weights in the config stays.
    """
    folder = saved.folder
    with written(folder):
        card = renewed(folder, chosen)
        if with_exits:
            saved.model.save_pretrained(folder)
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        config |= {"criterion": chosen.criterion.to_dict(), "calibration": chosen.to_dict()}
        with saved_whole(folder) as files:
            (files / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            if card is not None:
                (files / README).write_text(card, encoding="utf-8")
