"""Train a small model with exits on a generated task, measure what early exit saves, and ask it three sentences.

Takes about a minute and a half on two CPU cores and needs no network. Every number printed was measured in this run.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, Trainer, pipeline, set_seed

from earlyexit_kernels.cli import arguments
from earlyexit_kernels.cli.evaluate import draw, layer_table, setting
from earlyexit_kernels.cli.outputs import check_folder, check_plot, save_tokenizer, written
from earlyexit_kernels.cli.train import training_arguments
from earlyexit_kernels.criteria import Criterion, Patience
from earlyexit_kernels.hf.convert import to_early_exit
from earlyexit_kernels.hf.predict import predict_with_exits
from earlyexit_kernels.tasks import toy
from earlyexit_kernels.tasks.load import EncodedSplit, encode, toy_splits
from earlyexit_kernels.tuning.report import environment, markdown_table, write_json
from earlyexit_kernels.tuning.sweep import Sweep, choose, collect_trace, sweep
from earlyexit_kernels.tuning.timing import Ratio, interleave, paired_ratio

#: Asked at the end, each harder than the one before.
QUESTIONS = (
    "The music was superb.",
    "Although the script was clever, the acting of the film was never funny.",
    "Although the cast was superb, it is false that the story was never tedious.",
)
PLAIN = "plain Hugging Face model"
BATCH_SIZES = (1, 32)


@dataclass(frozen=True)
class Sizes:
    """How much the demo does: rows of the splits, timed rounds, and batches in a round by batch size."""

    train_rows: int
    rows: int
    rounds: int
    batches: dict[int, int]


FULL = Sizes(train_rows=toy.TRAIN_ROWS, rows=toy.DEV_ROWS, rounds=15, batches={1: 24, 32: 4})
QUICK = Sizes(train_rows=3_200, rows=300, rounds=3, batches={1: 8, 32: 2})


@dataclass(frozen=True)
class Candidate:
    """One row of the table: a model as it would be served, and how it answers the test split.

    Attributes:
        model: the stock model, or one with exits and a criterion.
        right: ``[N]`` bool.
        exit_layer: ``[N]``, 1-based.
    """

    model: Any
    right: np.ndarray
    exit_layer: np.ndarray


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `earlyexit demo`."""
    add = parser.add_argument
    add("--output", type=arguments.path, default=Path("demo_output"), help="folder to write to (default: %(default)s)")
    add("--seed", type=arguments.seed, default=0, help="(default: %(default)s)")
    add(
        "--threads",
        type=arguments.threads,
        default=1,
        help="more don't pay on a model this small (default: %(default)s)",
    )
    add("--quick", action="store_true", help="a tenth of the training: shows the steps, not the result")


def run(args: argparse.Namespace) -> int:
    """Train, choose, measure, save, reload, ask."""
    sizes = QUICK if args.quick else FULL
    check_folder("--output", args.output)
    check_plot("--output", args.output / "curve.png")
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    set_seed(args.seed)
    facts = environment()
    print(f"{facts['cpu']}, {args.threads} thread(s), torch {torch.__version__}, denormals flushed to zero")
    tokenizer = toy.toy_tokenizer()
    collate = DataCollatorWithPadding(tokenizer)
    splits = toy_splits(seed=args.seed, train_rows=sizes.train_rows, dev_rows=sizes.rows, test_rows=sizes.rows)
    data = {name: encode(split, tokenizer) for name, split in splits.items()}

    plain = toy.toy_model(args.seed)
    model = to_early_exit(plain)
    print(f"\n1. Train {model.depth} exits with transformers' Trainer on {sizes.train_rows} generated sentences\n")
    _train(model, data["train"], collate, args)
    _give_last_exit(model, plain)

    tuning, reporting = (collect_trace(model, data[name], collate_fn=collate) for name in ("dev", "test"))
    result = sweep(tuning, reporting, points=32)
    print(f"\n2. Choose thresholds on {sizes.rows} sentences, report on {sizes.rows} others\n\n{layer_table(result)}\n")

    print("3. Measure; the alternatives take turns, so that a slow spell of the machine hits all of them\n")
    choices = _choices(result)
    candidates = {PLAIN: _candidate(plain, data["test"], collate, model.depth)}
    for name, criterion in choices.items():
        served = copy.deepcopy(model)
        served.set_criterion(criterion)
        candidates[name] = _candidate(served, data["test"], collate, model.depth)
    times = {size: _times(candidates, data["test"], collate, size, sizes) for size in BATCH_SIZES}
    print(_table(candidates, times, model.depth))
    print(
        f"\nWall-clock: median of {sizes.rounds} rounds, 20 to 80 % of them in brackets, against the stock model with"
    )
    print(
        "the same weights (BertForSequenceClassification; its head is the last exit's). With two classes, entropy and"
    )
    print("max_probability rank rows alike and choose alike.\n")
    shown = next((name for name, criterion in choices.items() if criterion is not None))
    print(f"Which sentences leave when, with {shown}:\n\n{_level_table(candidates[shown], splits['test'].levels)}\n")

    print(f"4. Save to {args.output / 'model'}, load with AutoModelForSequenceClassification, ask a pipeline\n")
    model.set_criterion(choices[shown])
    print(_ask(model, tokenizer, args.output / "model"))
    records = [*result.records(), *_records(candidates, times)]
    with written(args.output):
        curve = draw(result, args.output / "curve.png", title="generated task: accuracy against depth")
        print(f"\nCurve: {curve}\nEvery number: {write_json(args.output / 'demo.json', records, seed=args.seed)}")
    return 0


def _train(model: Any, data: EncodedSplit, collate: Callable, args: argparse.Namespace) -> None:
    # sequential: the rows stand in the order of the curriculum
    trainer_arguments = training_arguments(
        args.output / "model",
        args.seed,
        epochs=1,
        lr=6e-4,
        batch_size=32,
        train_sampling_strategy="sequential",
        use_cpu=True,
    )
    Trainer(model=model, args=trainer_arguments, train_dataset=data, data_collator=collate).train()
    model.eval()


def _give_last_exit(model: Any, plain: Any) -> None:
    """Put the trained last exit into the stock model, which shares the trained encoder already."""
    plain.bert.pooler.dense.load_state_dict(model.heads.dense[0].state_dict())
    plain.classifier.load_state_dict(model.heads.out[-1].state_dict())
    plain.eval()


def _choices(result: Sweep) -> dict[str, Criterion | None]:
    """The settings to measure: by name, thresholds chosen on the tuning split."""
    full = result.layers["tuning"][-1][result.metric]
    found: dict[str, Criterion | None] = {"full depth": None}
    for name, drop in (("entropy", 0.0), ("entropy", 0.01), ("max_probability", 0.0)):
        points = result.points[name]
        best = choose([point.tuning for point in points], full, metric=result.metric, drop=drop)
        if best is not None:
            found[f"{name}, {setting(points[best].criterion)}"] = points[best].criterion
    return found | {f"patience {p}": Patience(patience=p) for p in (1, 2)}


def _candidate(model: Any, data: EncodedSplit, collate: Callable, depth: int) -> Candidate:
    if hasattr(model, "criterion"):
        out = predict_with_exits(model, data, collate_fn=collate)
        return Candidate(model, out.logits.argmax(axis=1) == out.labels, out.exit_layer)
    right = []
    with torch.inference_mode():
        for start in range(0, len(data), 32):
            batch = collate([data[i] for i in range(start, min(start + 32, len(data)))])
            labels = batch.pop("labels")
            right.append((model(**batch).logits.argmax(dim=1) == labels).numpy())
    return Candidate(model, np.concatenate(right), np.full(len(data), depth))


def _times(
    candidates: dict[str, Candidate], data: EncodedSplit, collate: Callable, batch_size: int, sizes: Sizes
) -> dict[str, list[float]]:
    """Milliseconds of each candidate and round, over the same batches."""
    batches = []
    for number in range(sizes.batches[batch_size]):
        batch = collate([data[i] for i in range(number * batch_size, (number + 1) * batch_size)])
        batches.append({name: values for name, values in batch.items() if name != "labels"})

    def caller(model: Any) -> Callable[[], None]:
        def answer() -> None:
            with torch.inference_mode():
                for batch in batches:
                    model(**batch)

        return answer

    callers = {name: caller(candidate.model) for name, candidate in candidates.items()}
    return interleave(callers, repeats=sizes.rounds, warmup=2, progress=f"timing, batch {batch_size}")


def _table(candidates: dict[str, Candidate], times: dict[int, dict[str, list[float]]], depth: int) -> str:
    rows = []
    for name, candidate in candidates.items():
        saved = [_saved(paired_ratio(t[name], t[PLAIN])) if name != PLAIN else "0%" for t in times.values()]
        mean = candidate.exit_layer.mean()
        rows.append((name, f"{candidate.right.mean():.4f}", f"{mean:.2f}", f"{1 - mean / depth:.0%}", *saved))
    clocks = [f"wall-clock saved, batch {size}" for size in times]
    return markdown_table(("model", "accuracy", "mean exit layer", "layers saved", *clocks), rows)


def _saved(ratio: Ratio) -> str:
    return f"{1 - ratio.median:.0%} ({1 - ratio.high:.0%} to {1 - ratio.low:.0%})"


def _records(candidates: dict[str, Candidate], times: dict[int, dict[str, list[float]]]) -> list[dict[str, Any]]:
    return [
        {
            "kind": "demo",
            "model": name,
            "accuracy": float(candidate.right.mean()),
            "mean_exit_layer": float(candidate.exit_layer.mean()),
            "milliseconds": {size: t[name] for size, t in times.items()},
            "time_ratio": {size: asdict(paired_ratio(t[name], t[PLAIN])) for size, t in times.items()},
        }
        for name, candidate in candidates.items()
    ]


def _level_table(candidate: Candidate, levels: Sequence[int]) -> str:
    """Accuracy and mean exit layer of each level of difficulty."""
    rows = []
    for level, title in enumerate(toy.LEVEL_NAMES, start=1):
        here = np.asarray(levels) == level
        right, layer = candidate.right[here].mean(), candidate.exit_layer[here].mean()
        rows.append((f"{level} {title}", int(here.sum()), f"{right:.4f}", f"{layer:.2f}"))
    return markdown_table(("difficulty", "sentences", "accuracy", "mean exit layer"), rows)


def _ask(model: Any, tokenizer: Any, folder: Path) -> str:
    """Save, load as anyone would, and classify the three questions."""
    with written(folder):
        model.save_pretrained(folder)
        save_tokenizer(tokenizer, folder)
    loaded: Any = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True)
    classify = pipeline("text-classification", model=loaded, tokenizer=tokenizer)
    rows = []
    for question in QUESTIONS:
        answer = classify(question)[0]
        with torch.inference_mode():
            exit_layer = int(loaded(**tokenizer(question, return_tensors="pt")).exit_layer)
        rows.append((question, answer["label"], f"{answer['score']:.3f}", exit_layer))
    return markdown_table(("sentence", "label", "score", "exit layer"), rows)
