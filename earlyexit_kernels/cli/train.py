"""Train a classifier with an exit after every layer, with transformers' Trainer.

The model, its tokenizer and earlyexit_task.json (the recipe of the training rows, and the score of every exit) are
saved in --output; `earlyexit eval` reads them back.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
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

from earlyexit_kernels.convert import to_early_exit
from earlyexit_kernels.model import EarlyExitForSequenceClassification
from earlyexit_kernels.objectives import OBJECTIVES
from earlyexit_kernels.report import markdown_table
from earlyexit_kernels.sweep import collect_trace, truncations
from earlyexit_kernels.task_sources import Split
from earlyexit_kernels.tasks import TASK_NAMES, EncodedSplit, Task, encode, holdout, load_task

RECIPE_FILE = "earlyexit_task.json"
WEIGHT_DECAY = 0.01
POOLINGS = {"family": None, "first": "first", "mean": "mean"}


@dataclass(frozen=True)
class Recipe:
    """Which rows a model was trained on, enough to find those held out again.

    Attributes:
        task: name for `load_task`.
        seed: of the draw of the rows (and of training).
        holdout: rows of the train split held out for tuning.
        train_rows: rows trained on, the first ones of the rest in drawn order.
        max_length: tokens a row was cut to, or None.
        evaluation_split: the split of `scores`.
        scores: metric values of each exit 1..L after training.
    """

    task: str
    seed: int
    holdout: int
    train_rows: int
    max_length: int | None
    evaluation_split: str
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
            return Recipe(**json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} isn't a recipe that this version wrote: {error}") from error

    def part(self, task: Task) -> tuple[Split, Split]:
        """The rows trained on and the rows held out."""
        rest, held = holdout(task.split("train"), self.holdout, seed=self.seed)
        return rest.take(range(self.train_rows)), held


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `earlyexit train`."""
    add = parser.add_argument
    add("--model", required=True, help="folder or hub name of a BERT-like encoder or classifier")
    add("--task", required=True, help=f"one of {', '.join(TASK_NAMES)}")
    add("--output", required=True, type=Path, help="folder to save in")
    add("--method", default="joint", help=f"one of {', '.join(sorted(OBJECTIVES))} (default: %(default)s)")
    add("--pooling", choices=sorted(POOLINGS), default="family", help="what exits read (family: the stock head)")
    add("--halting", action="store_true", help="add halting outputs ('joint' doesn't train them)")
    add("--train-rows", type=int, default=None, help="rows to train on (default: all that aren't held out)")
    add("--holdout", type=int, default=1000, help="train rows kept for tuning thresholds (default: %(default)s)")
    add("--epochs", type=float, default=3.0, help="(default: %(default)s)")
    add("--lr", type=float, default=5e-5, help="peak learning rate of the encoder (default: %(default)s)")
    add("--head-lr", type=float, default=1e-3, help="peak learning rate of the fresh exits (default: %(default)s)")
    add("--batch-size", type=int, default=32, help="(default: %(default)s)")
    add("--max-length", type=int, default=128, help="tokens a row is cut to (default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Train, save, and print the score of every exit."""
    task = load_task(args.task, seed=args.seed)
    recipe = _recipe(args, task)
    train_split, _ = recipe.part(task)
    if torch.set_flush_denormal(True):
        print("Denormal numbers are flushed to zero: with them, CPU training can be ten times slower.")
    set_seed(args.seed)
    base, tokenizer = load_base(args.model, task)
    model = to_early_exit(base, method=args.method, pooling=POOLINGS[args.pooling], halting=args.halting)
    collate = DataCollatorWithPadding(tokenizer)
    print(f"Training {model.depth} exits of {args.model} on {len(train_split)} rows of {task.name} ({task.source})")
    train_set = encode(train_split, tokenizer, max_length=recipe.max_length)
    check_vocabulary(train_set, tokenizer, args.model)
    trainer = Trainer(
        model=model,
        args=training_arguments(args.output, args.seed, args.epochs, args.lr, args.batch_size),
        train_dataset=train_set,
        data_collator=collate,
        optimizers=(two_rate_optimizer(model, args.lr, args.head_lr), None),
    )
    trainer.train()
    evaluation = encode(task.split(recipe.evaluation_split), tokenizer, max_length=recipe.max_length)
    trace, labels = collect_trace(model, evaluation, collate_fn=collate, progress=recipe.evaluation_split)
    scores = truncations(trace, labels, metrics=task.metrics)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    Recipe(**{**asdict(recipe), "scores": scores}).save(args.output)
    header = ("exit after layer", *task.metrics)
    rows = [(k, *(f"{score[m]:.4f}" for m in task.metrics)) for k, score in enumerate(scores, start=1)]
    print(f"\nEvery exit on the {recipe.evaluation_split} split ({len(labels)} rows):\n")
    print(f"{markdown_table(header, rows)}\n")
    print(f"Saved in {args.output}; next: earlyexit eval --model {args.output}")
    return 0


def _recipe(args: argparse.Namespace, task: Task) -> Recipe:
    available = len(task.split("train")) - args.holdout
    rows = available if args.train_rows is None else args.train_rows
    if args.holdout < 0 or not 1 <= rows <= available:
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
    if not local and name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"--model: expected a folder with a saved model, or a hub name; {name} doesn't exist")
    tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local)
    model = AutoModelForSequenceClassification.from_pretrained(
        name,
        num_labels=task.num_labels,
        id2label=dict(enumerate(task.label_names)),
        label2id={label: i for i, label in enumerate(task.label_names)},
        problem_type=task.problem_type,
        ignore_mismatched_sizes=True,
        local_files_only=local,
    )
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


def two_rate_optimizer(model: EarlyExitForSequenceClassification, lr: float, head_lr: float) -> torch.optim.Optimizer:
    """AdamW in which the exits, which start from nothing, learn faster than the pretrained encoder."""
    groups = [{"params": model.backbone.parameters(), "lr": lr}, {"params": model.heads.parameters(), "lr": head_lr}]
    return torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY)


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
