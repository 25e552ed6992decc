"""Classify the rows of a file, or texts, with a saved early-exit model."""

from __future__ import annotations

import argparse

import numpy as np
from transformers import AutoTokenizer, DataCollatorWithPadding

from earlyexit_kernels.cli.evaluate import load_any
from earlyexit_kernels.cli.inputs import loaded_from
from earlyexit_kernels.cli.outputs import check_folder, written
from earlyexit_kernels.cli.recipe import RECIPE_FILE, Recipe
from earlyexit_kernels.hf.predict import ExitPredictions, predict_with_exits
from earlyexit_kernels.tasks.files import read_table, write_table
from earlyexit_kernels.tasks.load import encode
from earlyexit_kernels.tasks.own import Columns, texts_of
from earlyexit_kernels.tasks.sources import HIDDEN, Split, Text
from earlyexit_kernels.tuning.metrics import probabilities

#: Columns added to those of the input.
ADDED = ("label", "score", "exit_layer")


def run(args: argparse.Namespace) -> int:
    """Print the answers to texts, or write those to a file."""
    if not args.model.is_dir():
        raise FileNotFoundError(f"--model: expected a folder with a saved model, {args.model} is not one")
    recipe = Recipe.load(args.model) if (args.model / RECIPE_FILE).is_file() else None
    own = None if recipe is None else recipe.data
    columns = Columns() if own is None else own.columns
    text, pair = args.text_column or columns.text, args.pair_column or columns.pair
    if args.input is None:
        _check_texts(args, pair)
        answers = _answers(args, recipe, args.text)
        for one, label, score, layer in zip(args.text, *answers, strict=True):
            print(f"{label} ({score:.4f}), exit layer {layer}: {one}")
        return 0
    _check_output(args)
    table = read_table(args.input)
    doubled = [name for name in ADDED if name in table.columns]
    if doubled:
        raise ValueError(
            f"--input: {args.input} has a column {doubled[0]!r}, which the predictions would replace; rename it"
        )
    answers = _answers(args, recipe, texts_of(table, text, pair))
    with written(args.output):
        write_table(args.output, {**table.columns, **dict(zip(ADDED, answers, strict=True))})
    print(f"{args.output}: {len(table)} rows, mean exit layer {np.mean(answers[2]):.2f}")
    return 0


def _check_texts(args: argparse.Namespace, pair: str | None) -> None:
    named = [name for name in ("output", "text_column", "pair_column") if getattr(args, name) is not None]
    if named:
        raise ValueError(f"--{named[0].replace('_', '-')}: expected beside --input; --text prints its answers")
    if pair is not None:
        raise ValueError("--text: the model was trained on pairs of texts; give them as a file with --input")


def _check_output(args: argparse.Namespace) -> None:
    if args.output is None:
        raise ValueError("--input: expected --output FILE, where the predictions are written")
    if args.output.exists():
        raise FileExistsError(f"--output: {args.output} exists, and is not overwritten; give a new file")
    check_folder("--output", args.output.parent)


def _answers(
    args: argparse.Namespace, recipe: Recipe | None, texts: list[Text]
) -> tuple[list[str], list[float], list[int]]:
    """Return the label, the score and the exit layer of each text.

    Raises:
        ValueError: several labels a row, or as for `load_any`.
    """
    model = load_any(args.model)
    if model.config.problem_type == "multi_label_classification":
        raise ValueError(f"--model: expected one label a row, {args.model} has several; use predict_with_exits")
    longest = model.adapter.longest(model.config.backbone_config)
    with loaded_from(args.model):
        tokenizer = AutoTokenizer.from_pretrained(args.model, local_files_only=True)
    max_length = longest if recipe is None else min(recipe.max_length or longest, longest)
    rows = encode(Split(texts, [HIDDEN] * len(texts)), tokenizer, max_length=max_length)
    collate = DataCollatorWithPadding(tokenizer)
    found = predict_with_exits(model, rows, batch_size=args.batch_size, collate_fn=collate)
    classes, scores = _best(found)
    return [model.config.id2label[int(one)] for one in classes], scores.tolist(), found.exit_layer.tolist()


def _best(found: ExitPredictions) -> tuple[np.ndarray, np.ndarray]:
    """Return the most probable class and its probability, or for one output class 0 and the number, as `pipeline`."""
    if found.logits.shape[1] == 1:
        return np.zeros(len(found.logits), dtype=np.int64), found.logits[:, 0].astype(np.float64).round(6)
    scores = probabilities(found.logits)
    return found.logits.argmax(axis=1), scores.max(axis=1).round(6)
