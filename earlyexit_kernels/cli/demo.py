"""Train a small early-exit model on a generated task, measure the time that early exit saves, and use the model."""

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

from earlyexit_kernels.cli.evaluate import draw, layer_table
from earlyexit_kernels.cli.outputs import check_folder, check_plot, save_tokenizer, written
from earlyexit_kernels.cli.train import training_arguments
from earlyexit_kernels.criteria import Criterion, Patience
from earlyexit_kernels.data import toy
from earlyexit_kernels.hf.convert import to_early_exit
from earlyexit_kernels.hf.predict import predict_with_exits
from earlyexit_kernels.tasks.load import EncodedSplit, encode, toy_splits
from earlyexit_kernels.tuning.sweep import Sweep, fastest_within_drop, sweep
from earlyexit_kernels.tuning.tables import environment, markdown_table, parameter_text, write_json
from earlyexit_kernels.tuning.timing import Ratio, interleave, paired_ratio
from earlyexit_kernels.tuning.traces import collect_trace

#: Classified at the end, in order of difficulty.
SENTENCES = (
    "The music was superb.",
    "Although the script was clever, the acting of the film was never funny.",
    "Although the cast was superb, it is false that the story was never tedious.",
)
PLAIN = "plain Hugging Face model"
NOTE = """Wall-clock: median of {rounds} rounds, with the 20 % and 80 % quantiles in brackets, against the stock model
with the same weights (BertForSequenceClassification with the head of the last exit). With two classes, entropy and
max_probability rank rows alike and choose alike."""
BATCH_SIZES = (1, 32)
QUICK_NOTE = "--quick trains too little for meaningful accuracies and exit layers: those below only show the format."


@dataclass(frozen=True)
class Sizes:
    """Amount of work of the demo.

    Attributes:
        train_rows: rows to train on.
        rows: rows of the tuning and of the reporting split.
        rounds: timed rounds.
        batches: batch size -> batches per round.
    """

    train_rows: int
    rows: int
    rounds: int
    batches: dict[int, int]


FULL = Sizes(train_rows=toy.TRAIN_ROWS, rows=toy.DEV_ROWS, rounds=15, batches={1: 24, 32: 4})
QUICK = Sizes(train_rows=3_200, rows=300, rounds=3, batches={1: 8, 32: 2})


@dataclass(frozen=True)
class Candidate:
    """A model to measure, and its answers to the test split.

    Attributes:
        model: the stock model, or one with exits and a criterion.
        correct: ``[N]`` bool.
        exit_layer: ``[N]``, 1-based.
    """

    model: Any
    correct: np.ndarray
    exit_layer: np.ndarray


def run(args: argparse.Namespace) -> int:
    """Train, choose thresholds, measure, save, reload and classify."""
    sizes = QUICK if args.quick else FULL
    check_folder("--output", args.output)
    check_plot("--output", args.output / "curve.png")
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    set_seed(args.seed)
    print(f"{environment()['cpu']}, {args.threads} thread(s), torch {torch.__version__}, denormals flushed to zero")
    tokenizer = toy.toy_tokenizer()
    collate = DataCollatorWithPadding(tokenizer)
    splits = toy_splits(seed=args.seed, train_rows=sizes.train_rows, dev_rows=sizes.rows, test_rows=sizes.rows)
    data = {name: encode(split, tokenizer) for name, split in splits.items()}

    plain = toy.toy_model(args.seed)
    model = to_early_exit(plain)
    print(
        f"\n1. Train {model.depth} exits with the Trainer of transformers on {sizes.train_rows} generated sentences\n"
    )
    _train(model, data["train"], collate, args)
    _copy_last_exit(model, plain)

    print(f"\n2. Choose thresholds on {sizes.rows} sentences, report on {sizes.rows} others\n")
    if args.quick:
        print(f"{QUICK_NOTE}\n")
    result = sweep(*(collect_trace(model, data[name], collate_fn=collate) for name in ("dev", "test")), points=32)
    print(f"{layer_table(result)}\n")

    print("3. Measure; the models take turns, so that a slow phase of the machine affects all of them alike\n")
    criteria = _criteria(result)
    candidates = _candidates(plain, model, criteria, data["test"], collate)
    times = {size: _times(candidates, data["test"], collate, size, sizes) for size in BATCH_SIZES}
    print(_table(candidates, times, model.depth), NOTE.format(rounds=sizes.rounds), sep="\n\n")
    shown = next(name for name, criterion in criteria.items() if criterion is not None)
    print(f"\nExit layer by difficulty, with {shown}:\n\n{_level_table(candidates[shown], splits['test'].levels)}\n")

    folder = args.output / "model"
    print(f"4. Save to {folder}, load with AutoModelForSequenceClassification, classify with a pipeline\n")
    model.set_criterion(criteria[shown])
    print(_classify(model, tokenizer, folder))
    with written(args.output):
        curve = draw(result, args.output / "curve.png", title="generated task: accuracy against depth")
        records = [*result.records(), *_records(candidates, times)]
        results = write_json(args.output / "demo.json", records, seed=args.seed)
    print(f"\nCurve: {curve}\nEvery number: {results}")
    return 0


def _train(model: Any, data: EncodedSplit, collate: Callable, args: argparse.Namespace) -> None:
    # sequential: the rows are in the order of the curriculum
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


def _copy_last_exit(model: Any, plain: Any) -> None:
    """Copy the trained last exit into the stock model, which shares the encoder of `model`."""
    plain.bert.pooler.dense.load_state_dict(model.heads.dense[0].state_dict())
    plain.classifier.load_state_dict(model.heads.out[-1].state_dict())
    plain.eval()


def _criteria(result: Sweep) -> dict[str, Criterion | None]:
    """Return the criteria to measure by name, with thresholds chosen on the tuning split."""
    full = result.layers["tuning"][-1][result.metric]
    found: dict[str, Criterion | None] = {"full depth": None}
    for name, drop in (("entropy", 0.0), ("entropy", 0.01), ("max_probability", 0.0)):
        points = result.points[name]
        best = fastest_within_drop([point.tuning for point in points], full, metric=result.metric, drop=drop)
        if best is not None:
            found[f"{name}, {parameter_text(points[best].criterion)}"] = points[best].criterion
    return found | {f"patience {p}": Patience(patience=p) for p in (1, 2)}


def _candidates(
    plain: Any, model: Any, criteria: dict[str, Criterion | None], data: EncodedSplit, collate: Callable
) -> dict[str, Candidate]:
    """Return the stock model and a copy of `model` with each criterion, by name."""
    candidates = {PLAIN: _candidate(plain, data, collate, model.depth)}
    for name, criterion in criteria.items():
        served = copy.deepcopy(model)
        served.set_criterion(criterion)
        candidates[name] = _candidate(served, data, collate, model.depth)
    return candidates


def _candidate(model: Any, data: EncodedSplit, collate: Callable, depth: int) -> Candidate:
    if hasattr(model, "criterion"):
        out = predict_with_exits(model, data, collate_fn=collate)
        return Candidate(model, out.logits.argmax(axis=1) == out.labels, out.exit_layer)
    correct = []
    with torch.inference_mode():
        for start in range(0, len(data), 32):
            batch = collate([data[i] for i in range(start, min(start + 32, len(data)))])
            labels = batch.pop("labels")
            correct.append((model(**batch).logits.argmax(dim=1) == labels).numpy())
    return Candidate(model, np.concatenate(correct), np.full(len(data), depth))


def _times(
    candidates: dict[str, Candidate], data: EncodedSplit, collate: Callable, batch_size: int, sizes: Sizes
) -> dict[str, list[float]]:
    """Return the milliseconds of each candidate and round, over the same batches."""
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
        rows.append((name, f"{candidate.correct.mean():.4f}", f"{mean:.2f}", f"{1 - mean / depth:.0%}", *saved))
    clocks = [f"wall-clock saved, batch {size}" for size in times]
    return markdown_table(("model", "accuracy", "mean exit layer", "layers saved", *clocks), rows)


def _saved(ratio: Ratio) -> str:
    return f"{1 - ratio.median:.0%} ({1 - ratio.high:.0%} to {1 - ratio.low:.0%})"


def _records(candidates: dict[str, Candidate], times: dict[int, dict[str, list[float]]]) -> list[dict[str, Any]]:
    return [
        {
            "kind": "demo",
            "model": name,
            "accuracy": float(candidate.correct.mean()),
            "mean_exit_layer": float(candidate.exit_layer.mean()),
            "milliseconds": {size: t[name] for size, t in times.items()},
            "time_ratio": {size: asdict(paired_ratio(t[name], t[PLAIN])) for size, t in times.items()},
        }
        for name, candidate in candidates.items()
    ]


def _level_table(candidate: Candidate, levels: Sequence[int]) -> str:
    """Return a table of accuracy and mean exit layer for each level of difficulty."""
    rows = []
    for level, title in enumerate(toy.LEVEL_NAMES, start=1):
        here = np.asarray(levels) == level
        accuracy, layer = candidate.correct[here].mean(), candidate.exit_layer[here].mean()
        rows.append((f"{level} {title}", int(here.sum()), f"{accuracy:.4f}", f"{layer:.2f}"))
    return markdown_table(("difficulty", "sentences", "accuracy", "mean exit layer"), rows)


def _classify(model: Any, tokenizer: Any, folder: Path) -> str:
    """Save the model, load it with transformers, and return a table of its answers to `SENTENCES`."""
    with written(folder):
        model.save_pretrained(folder)
        save_tokenizer(tokenizer, folder)
    loaded: Any = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True)
    classify = pipeline("text-classification", model=loaded, tokenizer=tokenizer, device="cpu")
    rows = []
    for sentence in SENTENCES:
        answer = classify(sentence)[0]
        with torch.inference_mode():
            exit_layer = int(loaded(**tokenizer(sentence, return_tensors="pt")).exit_layer)
        rows.append((sentence, answer["label"], f"{answer['score']:.3f}", exit_layer))
    return markdown_table(("sentence", "label", "score", "exit layer"), rows)
