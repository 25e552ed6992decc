"""Choose the setting of every criterion for a target, on rows that the model was not trained on; apply one of them."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from earlyexit_kernels.cli.arguments import AUTO
from earlyexit_kernels.cli.card import README, renewed
from earlyexit_kernels.cli.evaluate import encoded, load_model
from earlyexit_kernels.cli.inputs import metrics_for, queries_of
from earlyexit_kernels.cli.outputs import check_file, check_folder, written
from earlyexit_kernels.cli.recipe import Recipe
from earlyexit_kernels.hf.saving import CONFIG, saved_whole
from earlyexit_kernels.tasks.own import digest_of
from earlyexit_kernels.tuning.calibrate import calibrate
from earlyexit_kernels.tuning.record import Calibration
from earlyexit_kernels.tuning.settings import MIN_POINTS, rule_names, settings
from earlyexit_kernels.tuning.tables import markdown_table, parameter_text, write_json
from earlyexit_kernels.tuning.targets import Latency, MaxDrop, Risk, SpeedUp, Target, UnreachableTargetError
from earlyexit_kernels.tuning.traces import collect_trace

#: Target -> which setting of all rules `auto` is.
AUTO_REASONS: dict[type[Target], str] = {
    MaxDrop: "of all settings within the drop on the tuning rows, and not beyond it on the check rows by more than a "
    "standard error, it runs the fewest layers",
    SpeedUp: "of all settings that are fast enough on the tuning rows it is the slowest within one standard error of "
    "the highest score",
    Latency: "of all settings within the latency it is the slowest within one standard error of the highest score",
    Risk: "of all settings that pass the tests it runs the fewest layers",
}

#: Whether the target is a guarantee -> how to go on after the table.
NEXT_STEPS = {
    False: "To save one of them with the model, repeat with --apply CRITERION, or --apply auto for the best",
    True: "To save one with the model, repeat with --apply auto, which chooses the criterion on the tuning rows. The "
    "guarantee does not hold for a criterion that was chosen by this table, whose risks are those of the check rows",
}


def run(args: argparse.Namespace) -> int:
    """Print a table of every criterion for the target, and write what was asked for."""
    target = target_from(args)
    if not args.model.is_dir():
        raise FileNotFoundError(f"--model: expected a folder written by `earlyexit train`, {args.model} is not one")
    recipe = Recipe.load(args.model)
    if args.output is not None:
        check_file("--output", args.output)
    if args.apply is not None:
        check_folder("--model", args.model)
    task = recipe.load_data(dev=args.dev)
    if args.dev is not None and recipe.data is not None and digest_of(args.dev) == recipe.data.digest:
        print(
            f"warning: --dev: {args.dev} is the file that the model was trained on, on whose rows it is surer than on "
            "others; the setting will lose more than it seems. Give other rows\n"
        )
    (metric,) = metrics_for(task, [args.metric or task.metric], predictions_only=True)
    model = load_model(args.model, task)
    allowed = rule_names(model.heads.aux_names, task.problem_type)
    if args.apply not in (None, AUTO, *allowed):
        raise ValueError(f"--apply: expected auto or a criterion of this model, {', '.join(allowed)}; got {args.apply}")
    rows, kind = recipe.unseen_rows(task)
    data, collate = encoded(args.model, model, {kind: rows}, max_length=recipe.max_length)
    trace, labels = collect_trace(model, data[kind], collate_fn=collate, batch_size=args.batch_size, progress=kind)
    given: Any = trace, labels
    if isinstance(target, Latency):  # measured, on the model
        given = model, data[kind]
    choose = partial(calibrate, *given, target=target, metric=metric, batch_size=args.batch_size)
    choose = partial(choose, collate_fn=collate, problem_type=task.problem_type, groups=queries_of(rows))
    rules = list(settings(trace, points=MIN_POINTS, problem_type=task.problem_type))
    found, missed = _each(rules, choose)
    print(f"{args.model}, {target}: chosen on half of {len(rows)} {kind}, checked on the other half\n")
    if found:
        print(result_table(found, target, metric, trace.depth), end="\n\n")
    for name, nearest in missed.items():
        print(f"{name} cannot reach the target; the nearest is {nearest}")
    if args.output is not None:
        _write(args, found, missed)
    if not found and args.apply is None:
        raise ValueError(f"no criterion of this model reaches {target}; the nearest settings are listed above")
    if args.apply is None:
        print(NEXT_STEPS[type(target) is Risk])
        return 0
    chosen = _applied(args.apply, found, choose)
    with written(args.model):
        renewed_card = apply_to_folder(args.model, chosen)
    if args.apply == AUTO:
        print(f"\nauto chose {chosen.criterion.name}: {AUTO_REASONS[type(target)]}")
    print(f"\nSaved in {args.model / CONFIG}{f' and {README}' if renewed_card else ''}:\n\n{chosen}")
    print(f"\nNext: earlyexit report --model {args.model} --output report.html, or earlyexit predict")
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
    found, missed = {}, {}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for name in rules:
            try:
                found[name] = choose(criterion=name)
            except UnreachableTargetError as error:
                missed[name] = error.nearest
    for message in dict.fromkeys(str(warning.message) for warning in told):
        print(f"warning: {message}\n")
    return found, missed


def _applied(name: str, found: Mapping[str, Calibration], choose: Callable[..., Calibration]) -> Calibration:
    if name in found:
        return found[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # printed above
        return choose(criterion=name)  # raises for a rule that cannot reach the target


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


def _write(args: argparse.Namespace, found: Mapping[str, Calibration], missed: Mapping[str, str]) -> None:
    records: list[dict[str, Any]] = [{"rule": name, "calibration": one.to_dict()} for name, one in found.items()]
    records += [{"rule": name, "nearest": nearest} for name, nearest in missed.items()]
    given = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "debug"}
    with written(args.output):
        print(f"\nEvery criterion: {write_json(args.output, records, arguments=given)}")


def apply_to_folder(folder: Path, found: Calibration) -> bool:
    """Write a criterion and its calibration into the config of a saved model, and renew its card; nothing else.

    Both files change, or none. The weights are not written, so that their digest in the config stays.

    Args:
        folder: of the model.
        found: the calibration of its exits.

    Returns:
        whether the folder has a model card with a section for the calibration.

    Raises:
        OSError: the files cannot be written.
    """
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config |= {"criterion": found.criterion.to_dict(), "calibration": found.to_dict()}
    card = renewed(folder, found)
    with saved_whole(folder) as files:
        (files / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if card is not None:
            (files / README).write_text(card, encoding="utf-8")
    return card is not None
