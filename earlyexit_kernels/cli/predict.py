"""Classify the rows of a file, or texts, with a saved early-exit model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from earlyexit_kernels.cli.evaluate import load_any
from earlyexit_kernels.cli.inputs import loaded_from
from earlyexit_kernels.cli.outputs import check_folder, written
from earlyexit_kernels.cli.recipe import Recipe, recipe_of
from earlyexit_kernels.data.table import Table, read_table, write_table
from earlyexit_kernels.serving.answers import ERROR
from earlyexit_kernels.serving.scorer import Scorer
from earlyexit_kernels.tasks.own import Columns, texts_of
from earlyexit_kernels.tasks.sources import Text

#: Columns added to those of the input.
ADDED = ("label", "score", "exit_layer")
#: Begins their names where the input has such columns, as the file of a test set has its labels.
PREFIX = "predicted_"


def run(args: argparse.Namespace) -> int:
    """Print the answers to texts, or write those to a file."""
    recipe = recipe_of("--model", args.model)
    text, pair = text_columns(args, recipe)
    if args.input is None:
        _check_texts(args, pair)
        answers, errors, _ = _answers(args, recipe, args.text)
        for one, error, label, score, layer in zip(args.text, errors, *answers.values(), strict=True):
            print(f"no answer, {error}: {one}" if error else f"{label} ({score:.4f}), exit layer {layer}: {one}")
        return 0
    _check_output(args)
    table = read_table(args.input)
    names = _new_columns(table)
    answers, errors, depth = _answers(args, recipe, texts_of(table, text, pair))
    with written(args.output):
        write_table(args.output, {**table.columns, **{names[name]: values for name, values in answers.items()}})
    print(f"{args.output}: {_summary(table, answers, errors, depth)}")
    if names["label"] != "label":
        print(f"The input has columns of these names; the answers are in {', '.join(names.values())}")
    return 0


def _new_columns(table: Table) -> dict[str, str]:
    """Return the names of the columns to add; they begin with `PREFIX` if the input has a column of the same name.

    Raises:
        ValueError: it has columns of these names too.
    """
    prefix = PREFIX if any(name in table.columns for name in ADDED) else ""
    names = {name: f"{prefix}{name}" for name in ADDED}
    if doubled := [name for name in names.values() if name in table.columns]:
        raise ValueError(
            f"--input: {table.path} has a column {doubled[0]!r}, which the predictions would replace; rename it"
        )
    return names


def _summary(table: Table, answers: dict[str, list[Any]], errors: list[str], depth: int) -> str:
    """Return the number of rows, their mean exit layer, and how many have no answer."""
    layers = [layer for layer in answers["exit_layer"] if layer is not None]
    mean = f", mean exit layer {np.mean(layers):.2f} of {depth}" if layers else ""
    failed = [row for row, error in enumerate(errors) if error]
    without = f", {len(failed)} without an answer ({table.where(failed[0])}: {errors[failed[0]]})" if failed else ""
    return f"{len(table)} rows{mean}{without}"


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
) -> tuple[dict[str, list[Any]], list[str], int]:
    """Return the columns to add, with None where there is no answer; why there is none, or empty strings; and L.

    Raises:
        ValueError: as for `scorer_of`.
    """
    scorer = scorer_of(args.model, recipe, truncate=True, max_tokens=args.max_tokens)
    model, table = scorer.model, scorer(texts)
    columns = {"label": [model.config.id2label[0]] * len(texts), **table}  # of regression: the name of the number
    columns["score"] = [round(score, 6) for score in table["score"]]
    answers = {
        name: [None if error else value for value, error in zip(columns[name], table[ERROR], strict=True)]
        for name in ADDED
    }
    return answers, table[ERROR], model.depth


def text_columns(args: argparse.Namespace, recipe: Recipe | None) -> tuple[str, str | None]:
    """Return the columns of the text and of its pair: as asked for, or those of training.

    Raises:
        ValueError: a pair for a model that was trained on one text a row.
    """
    columns = Columns() if recipe is None or recipe.data is None else recipe.data.columns
    if args.pair_column and not columns.pair and recipe is not None and recipe.data is not None:
        raise ValueError(
            f"--pair-column: the model was trained on one text a row, got a second one, {args.pair_column!r}; leave "
            "the option out"
        )
    return args.text_column or columns.text, args.pair_column or columns.pair


def scorer_of(folder: Path, recipe: Recipe | None, *, truncate: bool, max_tokens: int) -> Scorer:
    """Return a scorer of a saved model that reports rows without an answer; rows are as long as in training.

    Raises:
        ValueError: several labels a row, or as for `load_any`.
    """
    model = load_any(folder)
    if model.config.problem_type == "multi_label_classification":
        raise ValueError(f"--model: expected one label a row, {folder} has several; use Scorer in Python")
    longest = model.adapter.longest(model.config.backbone_config)
    max_length = longest if recipe is None else min(recipe.max_length or longest, longest)
    with loaded_from(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        options: dict[str, Any] = {"max_tokens": max_tokens, "max_length": max_length}
        return Scorer(model, tokenizer, truncate=truncate, bad_rows="report", **options)
