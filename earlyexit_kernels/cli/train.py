"""Train a classifier with an exit after every layer, with the Trainer of transformers.

The model, its tokenizer and the recipe of the training (`recipe`) are saved in --output.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Subset
from transformers import (
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from earlyexit_kernels.backends import working_device
from earlyexit_kernels.cli.base_model import load_base, reads_last_token
from earlyexit_kernels.cli.card import README, card, check_card, score_table
from earlyexit_kernels.cli.inputs import (
    check_lengths,
    check_max_length,
    check_rows,
    check_vocabulary,
    queries_of,
)
from earlyexit_kernels.cli.outputs import check_folder, check_no_model, save_tokenizer
from earlyexit_kernels.cli.recipe import HELD_OUT, Recipe
from earlyexit_kernels.hf.convert import to_early_exit
from earlyexit_kernels.hf.saving import save_or_rescue
from earlyexit_kernels.hf.training import Phase, phases
from earlyexit_kernels.methods import Method, PhaseSpec, check_task, method_of
from earlyexit_kernels.tasks import hub
from earlyexit_kernels.tasks.load import EncodedSplit, Task, encode, holdout, load_task
from earlyexit_kernels.tasks.own import Columns, OwnData, listed, read_own
from earlyexit_kernels.tuning.rows import Rows
from earlyexit_kernels.tuning.traces import collect_trace

WEIGHT_DECAY = 0.01
#: Default of --holdout, and of own files the maximum of the default.
HOLDOUT = 1000
#: Share of the train rows that is kept from the other phases for one that needs rows of its own.
OTHER_ROWS = 0.2


def run(args: argparse.Namespace) -> int:
    """Train, save, and print the score of every exit."""
    method = method_from(args.method, args.set)
    plans = phase_plans(method, args)
    check_no_model(args.output, args.overwrite)
    check_card(args.output)
    ask_hub = functools.cache(hub.unreachable_reason)  # once for the task and the model
    own, task = load_rows(args, ask_hub)
    check_task(method, task.problem_type, task.num_labels)
    set_seed(args.seed)
    base, tokenizer, new_head = load_base(args.model, task, ask_hub=ask_hub)
    pooling = _pooling(args.pooling, new_head and not reads_last_token(base))
    recipe = _recipe(args, task, own)
    train_split, _ = recipe.train_splits(task)
    evaluation_split = recipe.evaluation_rows(task)
    check_rows(task, train_split, evaluation_split)
    torch.set_flush_denormal(True)  # CPUs are slow with numbers below 1e-38
    model = to_early_exit(base, method=method, pooling=pooling, form=args.form)
    collate = DataCollatorWithPadding(tokenizer)
    source = task.name if own is not None else f"{task.name} ({task.source})"
    print(
        f"Training {model.depth} exits of {args.model} on {len(train_split)} rows of {source} with "
        f"method {method.name!r}"
    )
    check_max_length(recipe.max_length, tokenizer, train_split)
    train_set = encode(train_split, tokenizer, max_length=recipe.max_length)
    evaluation = encode(evaluation_split, tokenizer, max_length=recipe.max_length)
    check_vocabulary(train_set, "train", tokenizer, model, args.model)
    check_lengths({"train": train_set, recipe.evaluation_split: evaluation}, model)
    check_folder("--output", args.output)
    first = plans[0]
    base_arguments = training_arguments(
        args.output, args.seed, first["epochs"], first["lr"], args.batch_size, bf16=args.bf16
    )
    sets = rows_of_phases(model.method.phases, train_set)
    for phase, plan, own_set in zip(phases(model), plans, sets, strict=True):
        plan["rows"] = len(own_set)
        print(f"Phase {phase.number} of {len(plans)}: {_plan_text(plan, model.heads.aux_names)}")
        _train_phase(phase, plan, base_arguments, own_set, collate)
    trace, labels = collect_trace(model, evaluation, collate_fn=collate, progress=recipe.evaluation_split)
    queries = queries_of(evaluation_split)
    rows = Rows(trace, labels, task.metric, task.problem_type, queries)
    scores = rows.truncations(task.metrics)
    recipe = replace(recipe, method=model.method.to_dict(), phases=tuple(plans), scores=scores)
    text = card(args.output, recipe, task, model, len(labels))
    if recipe.max_length is not None:  # a pipeline or a Scorer then cuts texts where training did
        tokenizer.model_max_length = min(tokenizer.model_max_length, recipe.max_length)
    savers = model.save_pretrained, functools.partial(save_tokenizer, tokenizer), recipe.save
    save_or_rescue(args.output, *savers, lambda folder: (folder / README).write_text(text, encoding="utf-8"))
    print(f"\nScore of every exit on {len(labels)} {recipe.evaluation_split} rows:\n")
    print(f"{score_table(scores, task.metrics)}\n")
    if advice := _advice(rows, pooling):
        print(f"{advice}\n")
    print(f"Saved in {args.output}; next: earlyexit calibrate --model {args.output} --max-drop 0.005 --apply auto")
    return 0


def _pooling(given: str | None, takes_mean: bool) -> str | None:
    """Return the argument `pooling` of `to_early_exit`, and say which one was chosen where none was given."""
    if given is not None:
        return None if given == "family" else given
    if not takes_mean:
        return None
    print("The model has no trained classifier: its exits read the mean of the tokens (--pooling mean).")
    return "mean"


def _advice(rows: Rows, pooling: str | None) -> str | None:
    """Return what to do about exits that are no better than chance, or None where all are better."""
    untrained = [layer for layer in range(1, rows.trace.depth + 1) if rows.is_chance(layer)]
    if rows.trace.depth in untrained:
        return "The last exit is no better than chance: give more rows, --epochs or another --lr before you go on."
    if not untrained:
        return None
    remedy = (
        "give more rows or --epochs" if pooling == "mean" else "--pooling mean often helps, more rows or --epochs too"
    )
    return f"No better than chance: exits {', '.join(map(str, untrained))}. Rows cannot leave there; {remedy}."


def _train_phase(
    phase: Phase, plan: dict[str, Any], base: TrainingArguments, train_set: Dataset, collate: Callable
) -> None:
    """Train one phase with the Trainer."""
    arguments = phase.args(base, output_dir=base.output_dir, num_train_epochs=plan["epochs"], learning_rate=plan["lr"])
    rates = {name: plan[name] for name in ("head_lr", "halting_lr", "gate_lr")}
    optimizer = phase.optimizer(arguments, **rates)
    Trainer(
        model=phase.model,
        args=arguments,
        train_dataset=train_set,
        data_collator=collate,
        callbacks=phase.callbacks(),
        optimizers=(optimizer, None),
    ).train()


def method_from(method: str, given: Sequence[str]) -> Method:
    """Return a training method with some of its options changed.

    Args:
        method: name of a training method.
        given: texts ``"key=value"``; a value that is not valid JSON is taken as a string.

    Raises:
        ValueError: an unknown method or option, a value out of range, or text of another form.
    """
    changes = {}
    default = method_of(method)
    known = [f.name for f in fields(default)]
    for text in given:
        key, sign, value = text.partition("=")
        if not sign or key not in known:
            raise ValueError(f"--set {text}: expected KEY=VALUE with an option of {method!r}, {', '.join(known)}")
        try:
            changes[key] = json.loads(value)
        except (ValueError, RecursionError):
            changes[key] = value
    return replace(default, **changes)


def phase_plans(method: Method, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the name, epochs and learning rates of each phase."""
    plans = []
    numbers = (_for_each_phase(method, name, getattr(args, name)) for name in ("epochs", "lr"))
    for spec, epochs, lr in zip(method.phases, *numbers, strict=True):
        head_lr = lr if args.head_lr is None else args.head_lr
        halting_lr = head_lr if args.halting_lr is None else args.halting_lr
        gate_lr = lr if args.gate_lr is None else args.gate_lr
        rates = {"lr": lr, "head_lr": head_lr, "halting_lr": halting_lr, "gate_lr": gate_lr}
        plans.append({"name": spec.name, "epochs": epochs, **rates})
    return plans


def rows_of_phases(specs: Sequence[PhaseSpec], train_set: EncodedSplit) -> list[Subset]:
    """Return the train rows of each phase: all, or where a phase needs other rows, the last fifth for it alone.

    Raises:
        ValueError: there are too few rows.
    """
    total = len(train_set)
    kept = max(1, round(total * OTHER_ROWS)) if any(spec.other_rows for spec in specs) else 0
    if kept == total:
        raise ValueError(f"expected at least 2 train rows, one of them for a phase of its own, got {total}")
    first, last = range(total - kept), range(total - kept, total)
    return [Subset(train_set, last if spec.other_rows else first) for spec in specs]


def _plan_text(plan: dict[str, Any], aux: Sequence[str]) -> str:
    """Describe a phase; rates of parts that the model does not have are left out."""
    absent = [name for name, part in {"halting_lr": "halting", "gate_lr": "gate"}.items() if part not in aux]
    numbers = (f"{name} {x:g}" for name, x in plan.items() if isinstance(x, float) and name not in absent)
    return ", ".join((plan["name"], *numbers, f"rows {plan['rows']}"))


def _for_each_phase(method: Method, name: str, given: Sequence[float] | None) -> list[float]:
    """Return the epochs or learning rates of all phases: those given, or the defaults of the method."""
    specs = method.phases
    if given is None:
        return [getattr(spec, name) for spec in specs]
    if len(given) not in (1, len(specs)):
        raise ValueError(
            f"--{name}: expected one number, or one for each of the {len(specs)} phases of "
            f"{method.name!r} ({', '.join(spec.name for spec in specs)}), got {list(given)}"
        )
    return list(given) * (len(specs) if len(given) == 1 else 1)


def load_rows(args: argparse.Namespace, ask_hub: Callable[[], str]) -> tuple[OwnData | None, Task]:
    """Load the task, or read the user's own files.

    Raises:
        ValueError: options for own files beside --task, or as for `load_task` and `read_own`.
        OSError: as for `load_task` and `read_own`.
    """
    options = ("dev", "text_column", "pair_column", "label_column", "group_column")
    given = {name: getattr(args, name) for name in options}
    named = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None]
    if args.train is None:
        if named:
            raise ValueError(f"{', '.join(named)}: expected --train FILE; --task {args.task} has its own rows")
        return None, load_task(args.task, seed=args.seed, ask_hub=ask_hub)
    columns = Columns(args.text_column or "text", args.pair_column, args.label_column or "label", args.group_column)
    own, task = read_own(args.train, args.dev, columns)
    labels = f"{task.num_labels} classes ({listed(task.label_names)})"
    if task.problem_type == "regression":
        queries = len(set(task.split("train").groups))
        labels = f"relevance to {queries} queries, column {columns.group!r}" if queries else "numbers (regression)"
    print(f"Labels of {own.name}, column {columns.label!r}: {labels}")
    return own, task


def _recipe(args: argparse.Namespace, task: Task, own: OwnData | None) -> Recipe:
    total = len(task.split("train"))
    held_out = _holdout(args, total)
    if task.split("train").groups and 0 < held_out < total:
        held_out = len(holdout(task.split("train"), held_out, seed=args.seed)[1])  # whole queries
    rows = total - held_out if args.train_rows is None else args.train_rows
    if not 1 <= rows <= total - held_out:
        raise ValueError(_too_many_rows(args, task.name, total))
    evaluation = task.evaluation
    if own is not None and args.dev is None:
        evaluation = HELD_OUT
        if held_out < 1:
            raise ValueError("--holdout: expected at least one row to report on, or a file with --dev, got 0")
    else:
        task.split(evaluation)  # raises if it has no visible labels
    return Recipe(args.task, args.seed, held_out, rows, args.max_length, evaluation, data=own, bf16=args.bf16)


def _holdout(args: argparse.Namespace, total: int) -> int:
    """Return the number of train rows to hold out."""
    if args.holdout is not None:
        return int(args.holdout)
    if args.train is None:
        return HOLDOUT
    return 0 if args.dev is not None else max(1, min(HOLDOUT, total // 5))


def _too_many_rows(args: argparse.Namespace, task: str, total: int) -> str:
    """Return the error message for rows that the train split does not have, with numbers that would fit."""
    given = f"--holdout {_holdout(args, total)}" + (" (the default)" if args.holdout is None else "")
    held_out = min(HOLDOUT, max(total // 5, min(total - 1, 1)))
    fitting = f"--holdout {held_out}"
    if args.train_rows is not None:
        given = f"--train-rows {args.train_rows} and {given}"
        left = total - args.train_rows
        fitting = f"--holdout {min(held_out, left)}" if left > 0 else f"--train-rows {total - held_out} {fitting}"
    return f"{given}: expected fewer rows, {task} has {total} train rows in total; {fitting} would fit"


def training_arguments(
    output: Path, seed: int, epochs: float, lr: float, batch_size: int, **others: Any
) -> TrainingArguments:
    """Return arguments of a Trainer run without checkpoints, logs and reports.

    Raises:
        BackendUnavailableError: torch finds a GPU and cannot use it, and ``use_cpu`` is not set.
    """
    on_gpu = not others.get("use_cpu") and working_device().type == "cuda"
    return TrainingArguments(
        output_dir=str(output),
        num_train_epochs=epochs,
        learning_rate=lr,
        per_device_train_batch_size=batch_size,
        warmup_steps=0.1,
        weight_decay=WEIGHT_DECAY,
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        dataloader_pin_memory=on_gpu,
        **{"use_cpu": not torch.accelerator.is_available()} | others,  # without it the Trainer refuses bf16 on a CPU
    )
