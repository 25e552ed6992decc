"""Train a classifier with an exit after every layer, with the Trainer of transformers.

The model, its tokenizer, a model card, a record of the training and the rows that were not trained on are saved in
--output.
"""

from __future__ import annotations

import argparse
import functools
import json
import shlex
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset
from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from earlyexit_kernels.backends import working_device
from earlyexit_kernels.cli.base_model import load_base, reads_last_token
from earlyexit_kernels.cli.card import README, card, score_table
from earlyexit_kernels.cli.checks import check_queries, check_vocabulary, metrics_for, queries_of, save_tokenizer
from earlyexit_kernels.cli.saved import HELD_OUT, Record, columns_of, digest_of
from earlyexit_kernels.data.rows import (
    CLASSES,
    NUMBERS,
    Columns,
    Labels,
    Split,
    check_columns,
    encode,
    hold_out,
    labels_in,
    read_rows,
)
from earlyexit_kernels.data.table import read_table, write_table
from earlyexit_kernels.hf.convert import to_early_exit
from earlyexit_kernels.hf.saving import save_or_rescue
from earlyexit_kernels.hf.training import Phase, phases
from earlyexit_kernels.methods import Method, PhaseSpec, check_task, method_of
from earlyexit_kernels.tuning.rows import Rows
from earlyexit_kernels.tuning.traces import collect_trace

WEIGHT_DECAY = 0.01
#: Default of --holdout: a fifth of the rows, and at most this number.
HOLDOUT = 1000
#: Share of the train rows that is kept from the other phases for one that needs rows of its own.
OTHER_ROWS = 0.2
#: Option --problem -> problem type of transformers.
PROBLEMS = {None: None, "classes": CLASSES, "regression": NUMBERS}
#: Seconds between lines of progress where there is no terminal.
TOLD = 30.0


def run(args: argparse.Namespace) -> int:
    """Train, save, and print the score of every exit."""
    method = method_from(args.method, args.set)
    plans = phase_plans(method, args)
    columns = columns_of(args, None)
    labels, train_rows, unseen, kind = read_splits(args, columns)
    check_task(method, labels.problem_type, len(labels.names))
    set_seed(args.seed)
    base, tokenizer, new_head = load_base(args.model, labels)
    pooling = _pooling(args.pooling, new_head and not reads_last_token(base))
    torch.set_flush_denormal(True)  # CPUs are slow with numbers below 1e-38
    model = to_early_exit(base, method=method, pooling=pooling, form=args.form)
    _check_disk(args.output, model)
    print(
        f"Training {model.depth} exits of {args.model} on {len(train_rows)} rows of {args.data.name} with method "
        f"{method.name!r}"
    )
    # as long as it was trained: a pipeline, a Scorer and the other commands then cut texts where training did
    tokenizer.model_max_length = _max_length(args.max_length, tokenizer, model, train_rows)
    train_set, unseen_set = (encode(split, tokenizer) for split in (train_rows, unseen))
    check_vocabulary(train_set, tokenizer, model, args.model)
    collate = DataCollatorWithPadding(tokenizer)
    _train_phases(args, model, plans, train_set, collate)
    trace, truth = collect_trace(model, unseen_set, collate_fn=collate, progress=kind)
    queries, metrics = queries_of(unseen), metrics_for(labels, bool(columns.group), None)
    rows = Rows(trace, truth, metrics[0], labels.problem_type, queries)
    scores = rows.truncations(metrics)
    record = Record(
        args.data.name,
        digest_of(args.data),
        columns,
        len(train_rows),
        kind,
        len(unseen),
        args.seed,
        args.bf16,
        tuple(plans),
        scores,
    )
    _save(
        args,
        model,
        tokenizer,
        record,
        card(args.output, record, labels, model, length=tokenizer.model_max_length, keep=args.keep_rows),
        unseen,
        labels,
    )
    print(f"\nScore of every exit on {len(truth)} {kind}:\n\n{score_table(scores, metrics)}\n")
    if advice := _advice(rows, pooling):
        print(f"{advice}\n")
    texts = f", and in {HELD_OUT} there the {len(unseen)} {kind}, texts included" if args.keep_rows else ""
    following = f"earlyexit calibrate {shlex.quote(str(args.output))} --max-drop 0.005"
    print(f"Saved in {args.output}{texts}; next: {following}{'' if args.keep_rows else ' --data FILE'}")
    return 0


def read_splits(args: argparse.Namespace, columns: Columns) -> tuple[Labels, Split, Split, str]:
    """Read the files.

    Returns:
        what the labels are, the rows to train on, other rows to choose and report on, and what those are.

    Raises:
        OSError: a file cannot be read.
        ValueError: unusable columns, texts or labels, or too few rows.
    """
    if args.dev is not None and args.dev.samefile(args.data):
        raise ValueError(f"--dev: expected other rows than those of --data, got {args.dev} for both")
    table = read_table(args.data)
    check_columns(table, columns)
    labels = labels_in(table, columns, problem=PROBLEMS[args.problem])
    rows = read_rows(table, columns, labels)
    print(f"Labels of {args.data.name}, column {columns.label!r}: {_labels_text(labels, rows, columns)}")
    if args.dev is not None:
        train_rows, unseen, kind = rows, read_rows(read_table(args.dev), columns, labels), f"rows of {args.dev.name}"
    else:
        number = max(1, min(HOLDOUT, len(rows) // 5)) if args.holdout is None else args.holdout
        left, held = hold_out(rows, number, seed=args.seed)
        train_rows, unseen, kind = rows.take(left), rows.take(held), f"held-out rows of {args.data.name}"
    check_queries({"report on": unseen})
    if len(set(train_rows.labels)) == 1:
        raise ValueError(
            f"--data: the {len(train_rows)} rows to train on all have one label; expected at least two different labels"
        )
    lacking = sorted(set(unseen.labels) - set(train_rows.labels)) if labels.problem_type == CLASSES else []
    if lacking:
        names = ", ".join(labels.names[int(label)] for label in lacking)
        raise ValueError(f"--data: no row to train on has the label {names}, which {kind} have; give more rows with it")
    return labels, train_rows, unseen, kind


def _labels_text(labels: Labels, rows: Split, columns: Columns) -> str:
    if columns.group is not None:
        return f"relevance to {len(set(rows.groups))} queries, column {columns.group!r}"
    if labels.problem_type == NUMBERS:
        return f"numbers (regression) from {min(rows.labels):g} to {max(rows.labels):g}"
    counts = Counter(rows.labels)
    named = [f"{name} {counts[number]}" for number, name in enumerate(labels.names)]
    shown = ", ".join(named[:8]) + (f" and {len(named) - 8} more" if len(named) > 8 else "")
    return f"{len(labels.names)} classes ({shown})"


def _max_length(wanted: int, tokenizer: Any, model: Any, rows: Split) -> int:
    """Return the maximum tokens of a row.

    Raises:
        ValueError: it leaves no room for text, or the model has fewer positions.
    """
    pairs = not isinstance(rows.texts[0], str)
    least = tokenizer.num_special_tokens_to_add(pair=pairs) + 1 + pairs
    if wanted < least:
        raise ValueError(f"--max-length: expected at least {least} for this tokenizer and these rows, got {wanted}")
    return min(wanted, int(tokenizer.model_max_length), model.adapter.longest(model.config.backbone_config))


def _check_disk(folder: Path, model: Any) -> None:
    """Raise OSError if the disk has no room for the model and the old one that it replaces."""
    needed, free = 2 * model.get_memory_footprint(), shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"--output: expected {needed / 1e6:.0f} MB of free disk in {folder}, got {free / 1e6:.0f} MB")


def _save(
    args: argparse.Namespace, model: Any, tokenizer: Any, record: Record, text: str, unseen: Split, labels: Labels
) -> None:
    """Write all files of the folder, or none."""
    savers = [model.save_pretrained, functools.partial(save_tokenizer, tokenizer), record.save]
    savers.append(lambda folder: (folder / README).write_text(text, encoding="utf-8"))
    if args.keep_rows:
        kept = table_of(unseen, record.columns, labels)
        savers.append(lambda folder: write_table(folder / HELD_OUT, kept))
    save_or_rescue(args.output, *savers)
    if not args.keep_rows:
        (args.output / HELD_OUT).unlink(missing_ok=True)  # of the model that was replaced


def table_of(split: Split, columns: Columns, labels: Labels) -> dict[str, list[Any]]:
    """Return rows as the columns of a file."""
    pairs = columns.pair is not None
    table: dict[str, list[Any]] = {columns.text: [text[0] if pairs else text for text in split.texts]}
    if columns.pair is not None:
        table[columns.pair] = [text[1] for text in split.texts]
    classes = labels.problem_type == CLASSES
    table[columns.label] = [labels.names[int(label)] if classes else float(label) for label in split.labels]
    return table if columns.group is None else table | {columns.group: list(split.groups)}


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


def _train_phases(
    args: argparse.Namespace, model: Any, plans: Sequence[dict[str, Any]], train_set: Any, collate: Callable
) -> None:
    """Train by the plan of each phase, and note its number of rows there."""
    first = plans[0]
    base = training_arguments(args.output, args.seed, first["epochs"], first["lr"], args.batch_size, bf16=args.bf16)
    sets = rows_of_phases(model.method.phases, train_set)
    for phase, plan, phase_set in zip(phases(model), plans, sets, strict=True):
        plan["rows"] = len(phase_set)
        print(f"Phase {phase.number} of {len(plans)}: {_plan_text(plan, model.heads.aux_names)}", flush=True)
        _train_phase(phase, plan, base, phase_set, collate)


def _train_phase(
    phase: Phase, plan: dict[str, Any], base: TrainingArguments, train_set: Subset, collate: Callable
) -> None:
    """Train one phase with the Trainer."""
    arguments = phase.args(base, output_dir=base.output_dir, num_train_epochs=plan["epochs"], learning_rate=plan["lr"])
    optimizer = phase.optimizer(arguments, **{name: plan[name] for name in ("head_lr", "gate_lr")})
    trainer = Trainer(
        model=phase.model,
        args=arguments,
        train_dataset=train_set,
        data_collator=collate,
        callbacks=phase.callbacks(),
        optimizers=(optimizer, None),
    )
    if base.disable_tqdm:
        trainer.add_callback(ProgressLines())
        trainer.remove_callback(PrinterCallback)  # a dictionary of times
    trainer.train()


class ProgressLines(TrainerCallback):
    """Prints a line with the rate and the time left every `TOLD` seconds, where there is no terminal for a bar."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer before the first step."""
        self.begun = self.told = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer after each step."""
        now = time.monotonic()
        if now - self.told >= TOLD:
            self.told = now
            rate = state.global_step / (now - self.begun)
            left = (state.max_steps - state.global_step) / rate
            print(f"step {state.global_step} of {state.max_steps}, {rate:.1f} a second, {left:.0f} s left", flush=True)


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
        gate_lr = lr if args.gate_lr is None else args.gate_lr
        rates = {"lr": lr, "head_lr": head_lr, "gate_lr": gate_lr}
        plans.append({"name": spec.name, "epochs": epochs, **rates})
    return plans


def rows_of_phases(specs: Sequence[PhaseSpec], train_set: Any) -> list[Subset]:
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
    absent = [] if "gate" in aux else ["gate_lr"]
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
        disable_tqdm=not sys.stderr.isatty(),
        dataloader_pin_memory=on_gpu,
        **{"use_cpu": not torch.accelerator.is_available()} | others,  # without it the Trainer refuses bf16 on a CPU
    )
