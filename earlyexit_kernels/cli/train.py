"""Train a classifier with an exit after every layer, with transformers' Trainer.

The model, its tokenizer and earlyexit_task.json (the recipe of the training rows, and the score of every exit) are
saved in --output; `earlyexit eval` reads them back.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from earlyexit_kernels.cli import arguments
from earlyexit_kernels.cli.inputs import check_encoder, check_lengths, check_max_length, check_rows, loaded_from
from earlyexit_kernels.cli.outputs import check_folder, save_tokenizer
from earlyexit_kernels.hf.convert import to_early_exit
from earlyexit_kernels.hf.saving import save_or_rescue
from earlyexit_kernels.hf.training import Phase, phases
from earlyexit_kernels.objectives import OBJECTIVES, Objective, check_task, from_dict
from earlyexit_kernels.objectives.arguments import Check, choice, optional, whole
from earlyexit_kernels.tasks.hub import offline_if_unreachable
from earlyexit_kernels.tasks.load import TASK_NAMES, EncodedSplit, Task, encode, holdout, load_task
from earlyexit_kernels.tasks.sources import Split
from earlyexit_kernels.tuning.report import markdown_table
from earlyexit_kernels.tuning.sweep import collect_trace, truncations

RECIPE_FILE = "earlyexit_task.json"
WEIGHT_DECAY = 0.01
POOLINGS = {"family": None, "first": "first", "mean": "mean"}


@dataclass(frozen=True)
class Recipe:
    """Which rows a model was trained on, enough to find those held out again, and how.

    Attributes:
        task: name for `load_task`.
        seed: of the draw of the rows (and of training).
        holdout: rows of the train split held out for tuning.
        train_rows: rows trained on, the first ones of the rest in drawn order.
        max_length: tokens a row was cut to, or None.
        evaluation_split: the split of `scores`.
        method: data of the training method.
        phases: for each phase its name, epochs and learning rates.
        scores: metric values of each exit 1..L after training.
    """

    task: str
    seed: int
    holdout: int
    train_rows: int
    max_length: int | None
    evaluation_split: str
    method: dict[str, Any] = field(default_factory=dict)
    phases: tuple[dict[str, Any], ...] = ()
    scores: tuple[dict[str, float], ...] = ()

    def save(self, folder: Path) -> None:
        """Write it beside the model."""
        (folder / RECIPE_FILE).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> Recipe:
        """Read it back.

        Raises:
            FileNotFoundError: the folder has none.
            ValueError: it isn't one.
        """
        path = folder / RECIPE_FILE
        if not path.is_file():
            raise FileNotFoundError(f"expected {RECIPE_FILE} in {folder}; `earlyexit train` writes it")
        try:
            recipe = Recipe(**json.loads(path.read_text(encoding="utf-8")))
            for name, check in RECIPE_CHECKS.items():
                check(name, getattr(recipe, name))
            from_dict(recipe.method)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} isn't a recipe that this version wrote: {error}") from error
        return recipe

    def part(self, task: Task) -> tuple[Split, Split]:
        """The rows trained on and the rows held out.

        Raises:
            ValueError: the train split has fewer rows.
        """
        available = len(task.split("train"))
        if self.train_rows + self.holdout > available:
            raise ValueError(
                f"{self.train_rows} rows to train on and {self.holdout} held out: the train split of task "
                f"{task.name!r} in {task.source} has {available} rows for both together"
            )
        rest, held = holdout(task.split("train"), self.holdout, seed=self.seed)
        return rest.take(range(self.train_rows)), held


#: What each field of a saved recipe must be; `Recipe.load` checks the method by building it.
RECIPE_CHECKS: dict[str, Check] = {
    "task": choice(*TASK_NAMES),
    "seed": whole(low=0),
    "holdout": whole(low=0),
    "train_rows": whole(low=1),
    "max_length": optional(whole(low=1)),
    "evaluation_split": choice("dev", "test"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `earlyexit train`."""
    add = parser.add_argument
    add("--model", required=True, type=arguments.source, help="folder or hub name of a BERT-like encoder or classifier")
    add("--task", required=True, type=arguments.one_of(TASK_NAMES), help=f"one of {', '.join(TASK_NAMES)}")
    add("--output", required=True, type=arguments.path, help="folder to save in")
    method = arguments.one_of(sorted(OBJECTIVES))
    add("--method", type=method, default="joint", help=f"one of {', '.join(sorted(OBJECTIVES))} (default: %(default)s)")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of the method, such as ponder=0.05; repeatable, the README lists them",
    )
    add("--pooling", choices=sorted(POOLINGS), default="family", help="what exits read (family: the stock head)")
    add("--train-rows", type=arguments.rows, default=None, help="rows to train on (default: all that aren't held out)")
    add(
        "--holdout",
        type=arguments.rows_or_none,
        default=1000,
        help="train rows kept for tuning thresholds (default: %(default)s)",
    )
    add(
        "--epochs",
        type=arguments.epochs,
        nargs="+",
        help="for all phases, or one number for each (default: the paper's)",
    )
    add(
        "--lr",
        type=arguments.learning_rate,
        nargs="+",
        help="peak rate of the encoder, likewise (default: the paper's)",
    )
    add(
        "--head-lr",
        type=arguments.rate_or_same,
        default=1e-3,
        help="peak rate of the exits, or 'same' for the encoder's, as in the papers, with which fresh exits learn "
        "little in few epochs (default: %(default)s)",
    )
    add("--halting-lr", type=arguments.learning_rate, help="peak rate of halting outputs (default: --head-lr)")
    add("--batch-size", type=arguments.batch_size, default=32, help="(default: %(default)s)")
    add("--max-length", type=arguments.max_length, default=128, help="tokens a row is cut to (default: %(default)s)")
    add("--seed", type=arguments.seed, default=0, help="(default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Train, save, and print the score of every exit."""
    objective = objective_from(args.method, args.set)
    plans = _plans(objective, args)
    task = load_task(args.task, seed=args.seed)
    check_task(objective, task.problem_type, task.num_labels)
    recipe = _recipe(args, task)
    train_split, _ = recipe.part(task)
    check_rows(task, train_split, task.split(recipe.evaluation_split))
    if torch.set_flush_denormal(True):
        print("Denormal numbers are flushed to zero: with them, CPU training can be ten times slower.")
    set_seed(args.seed)
    base, tokenizer = load_base(args.model, task)
    model = to_early_exit(base, method=objective, pooling=POOLINGS[args.pooling])
    collate = DataCollatorWithPadding(tokenizer)
    print(
        f"Training {model.depth} exits of {args.model} on {len(train_split)} rows of {task.name} ({task.source}) with "
        f"method {objective.name!r}"
    )
    check_max_length(recipe.max_length, tokenizer, train_split)
    train_set = encode(train_split, tokenizer, max_length=recipe.max_length)
    evaluation = encode(task.split(recipe.evaluation_split), tokenizer, max_length=recipe.max_length)
    check_vocabulary(train_set, tokenizer, args.model)
    check_lengths({"train": train_set, recipe.evaluation_split: evaluation}, model)
    check_folder("--output", args.output)
    base_arguments = training_arguments(args.output, args.seed, plans[0]["epochs"], plans[0]["lr"], args.batch_size)
    for phase, plan in zip(phases(model), plans, strict=True):
        print(f"Phase {phase.number} of {len(plans)}: {_words(plan)}")
        _train_phase(phase, plan, base_arguments, train_set, collate)
    trace, labels = collect_trace(model, evaluation, collate_fn=collate, progress=recipe.evaluation_split)
    scores = truncations(trace, labels, metrics=task.metrics)
    outcome = {"method": objective.to_dict(), "phases": tuple(plans), "scores": scores}
    recipe = Recipe(**{**asdict(recipe), **outcome})
    save_or_rescue(args.output, model.save_pretrained, partial(save_tokenizer, tokenizer), recipe.save)
    header = ("exit after layer", *task.metrics)
    rows = [(k, *(f"{score[m]:.4f}" for m in task.metrics)) for k, score in enumerate(scores, start=1)]
    print(f"\nEvery exit on the {recipe.evaluation_split} split ({len(labels)} rows):\n")
    print(f"{markdown_table(header, rows)}\n")
    print(f"Saved in {args.output}; next: earlyexit eval --model {args.output}")
    return 0


def _train_phase(
    phase: Phase, plan: dict[str, Any], base: TrainingArguments, train_set: EncodedSplit, collate: Callable
) -> None:
    """One run of the Trainer."""
    arguments = phase.args(base, output_dir=base.output_dir, num_train_epochs=plan["epochs"], learning_rate=plan["lr"])
    optimizer = phase.optimizer(arguments, head_lr=plan["head_lr"], halting_lr=plan["halting_lr"])
    Trainer(
        model=phase.model,
        args=arguments,
        train_dataset=train_set,
        data_collator=collate,
        callbacks=phase.callbacks(),
        optimizers=(optimizer, None),
    ).train()


def objective_from(method: str, given: Sequence[str]) -> Objective:
    """A training method with some of its settings changed.

    Args:
        method: a name of the objectives table.
        given: ``"key=value"``, the value read as JSON where it is JSON and as a word otherwise.

    Raises:
        ValueError: an unknown method or setting, a value out of range, or text of another form.
    """
    changes = {}
    known = [f.name for f in fields(OBJECTIVES[method])] if method in OBJECTIVES else []
    for text in given:
        key, sign, value = text.partition("=")
        if not sign or (known and key not in known):
            raise ValueError(f"--set {text}: expected KEY=VALUE with a setting of {method!r}, {', '.join(known)}")
        try:
            changes[key] = json.loads(value)
        except (ValueError, RecursionError):
            changes[key] = value
    return from_dict({**changes, "name": method})


def _plans(objective: Objective, args: argparse.Namespace) -> list[dict[str, Any]]:
    """For each phase its name, epochs and learning rates."""
    plans = []
    numbers = (_for_each_phase(objective, name, getattr(args, name)) for name in ("epochs", "lr"))
    for spec, epochs, lr in zip(objective.phases, *numbers, strict=True):
        head_lr = lr if args.head_lr is None else args.head_lr
        halting_lr = head_lr if args.halting_lr is None else args.halting_lr
        plans.append({"name": spec.name, "epochs": epochs, "lr": lr, "head_lr": head_lr, "halting_lr": halting_lr})
    return plans


def _words(plan: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:g}" if isinstance(value, float) else str(value) for name, value in plan.items())


def _for_each_phase(objective: Objective, name: str, given: Sequence[float] | None) -> list[float]:
    """Epochs or rates of all phases, from the method's own or the one or more given."""
    specs = objective.phases
    if given is None:
        return [getattr(spec, name) for spec in specs]
    if len(given) not in (1, len(specs)):
        raise ValueError(
            f"--{name}: expected one number, or one for each of the {len(specs)} phases of "
            f"{objective.name!r} ({', '.join(spec.name for spec in specs)}), got {list(given)}"
        )
    return list(given) * (len(specs) if len(given) == 1 else 1)


def _recipe(args: argparse.Namespace, task: Task) -> Recipe:
    available = len(task.split("train")) - args.holdout
    rows = available if args.train_rows is None else args.train_rows
    if not 1 <= rows <= available:
        raise ValueError(
            f"--train-rows {args.train_rows} and --holdout {args.holdout}: task {task.name!r} has "
            f"{len(task.split('train'))} train rows for both together"
        )
    task.split(task.evaluation)
    return Recipe(task.name, args.seed, args.holdout, rows, args.max_length, task.evaluation)


def load_base(name: str, task: Task) -> tuple[Any, Any]:
    """A stock classifier for a task, and its tokenizer, from a folder (without asking the network) or the hub.

    Raises:
        FileNotFoundError: a path that doesn't exist.
        OSError: the hub doesn't know the name, or can't be reached.
    """
    local = Path(name).is_dir()
    if Path(name).is_file():
        raise NotADirectoryError(f"--model: expected a folder with a saved model, or a hub name; {name} is a file")
    if not local and name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"--model: expected a folder with a saved model, or a hub name; {name} doesn't exist")
    if local:
        return _stock_of(name, task, local_files_only=True)
    with offline_if_unreachable() as reason:
        try:
            return _stock_of(name, task)
        except OSError as error:
            if not reason:
                raise
            raise ConnectionError(
                f"--model: {name} is neither a folder nor a model downloaded before, and the Hugging Face hub can't be "
                f"reached ({reason}); connect, or give a folder with a saved model"
            ) from error


def _stock_of(name: str, task: Task, **loading: Any) -> tuple[Any, Any]:
    with loaded_from(name):
        tokenizer = AutoTokenizer.from_pretrained(name, **loading)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name,
            num_labels=task.num_labels,
            id2label=dict(enumerate(task.label_names)),
            label2id={label: i for i, label in enumerate(task.label_names)},
            problem_type=task.problem_type,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **loading,
        )
        check_encoder(model, info)
    return model, tokenizer


def check_vocabulary(data: EncodedSplit, tokenizer: Any, name: str) -> None:
    """Refuse a tokenizer that doesn't know the text: a folder without one gets an empty one from transformers.

    Raises:
        ValueError: most tokens of the first rows are unknown.
    """
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    ids = [i for row in range(min(len(data), 200)) for i in data[row]["input_ids"] if i not in special]
    unknown = sum(i == tokenizer.unk_token_id for i in ids) / max(len(ids), 1)
    if unknown > 0.5:
        raise ValueError(
            f"--model: the tokenizer of {name} doesn't know {unknown:.0%} of the task's tokens; save the model's own "
            "tokenizer in the same folder"
        )


def training_arguments(
    output: Path, seed: int, epochs: float, lr: float, batch_size: int, **others: Any
) -> TrainingArguments:
    """Arguments of a plain Trainer run that writes no checkpoint and reports to nobody."""
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
        dataloader_pin_memory=torch.cuda.is_available(),
        **others,
    )
