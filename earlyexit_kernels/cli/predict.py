"""Classify texts, the rows of a file, or those of many files, with a saved early-exit model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from earlyexit_cli.files import names_folder
from earlyexit_kernels.cli.checks import loaded_from, written
from earlyexit_kernels.cli.saved import Record, columns_of, load_saved
from earlyexit_kernels.data.rows import Text, texts_of
from earlyexit_kernels.data.table import Table, read_table, write_table
from earlyexit_kernels.serving.answers import ERROR
from earlyexit_kernels.serving.rows import SHORTEN_IN_PYTHON
from earlyexit_kernels.serving.scorer import Scorer

#: Columns added to those of the input.
ADDED = ("label", "score", "exit_layer")
#: Begins their names where the input has such columns, as the file of a test set has its labels.
PREFIX = "predicted_"
#: Rows of a call of the scorer, between which progress is shown.
CALL = 4096
#: What to do about a row that is too long.
SHORTEN = "shorten it, or leave out --no-truncate"


def run(args: argparse.Namespace) -> int:
    """Print the answers to texts, or write those to a file or a folder."""
    columns = columns_of(args, Record.load(args.model))
    if args.text:
        if columns.pair is not None:
            raise ValueError("--text: the model was trained on pairs of texts; give them as a file")
        answers, errors, _ = _answers(args, args.text)
        for one, error, label, score, layer in zip(args.text, errors, *answers.values(), strict=True):
            print(f"no answer, {error}: {one}" if error else f"{label} ({score:.4f}), exit layer {layer}: {one}")
        return 0
    if names_folder(args.output):
        return predict_files(args, tuple(name for name in (columns.text, columns.pair) if name is not None))
    table = read_table(Path(args.input[0]))
    names = _new_columns(table)
    answers, errors, depth = _answers(args, texts_of(table, columns))
    with written(args.output):
        write_table(args.output, {**table.columns, **{names[name]: values for name, values in answers.items()}})
    print(f"{args.output}: {_summary(table, answers, errors, depth)}")
    if names["label"] != "label":
        print(f"The input has columns of these names; the answers are in {', '.join(names.values())}")
    return 0


def predict_files(args: argparse.Namespace, columns: tuple[str, ...]) -> int:
    """Write the units of many files that are not finished to a folder; the exit code is 2 if a file cannot be read."""
    from earlyexit_kernels.serving.files import plan, score_units

    # a model that cannot be loaded, or a tokenizer of another one, is an error here rather than in each worker
    options = scorer_of(args.model, truncate=args.truncate, max_tokens=args.max_tokens).options
    todo = plan(
        args.model,
        args.input,
        args.output,
        columns=columns,
        max_length=options.max_length,
        truncate=args.truncate,
        max_tokens=args.max_tokens,
        modules=tuple(args.modules),
        overwrite=args.overwrite,
    )
    units = todo.finished + len(todo.units)
    print(f"{todo.files} file(s), {len(todo.units)} of {units} units to predict", file=sys.stderr, flush=True)
    done = list(todo.problems)
    with tqdm(total=units, initial=todo.finished, unit="unit", disable=None) as bar:
        for unit in score_units(todo.job, todo.units, args.workers or 1) if todo.units else ():
            done.append(unit)
            bar.update()
    written_now = [one for one in done if not one.problem]
    without = sum(one.without for one in written_now)
    parts = [f"{args.output}: {sum(one.rows for one in written_now)} rows in {len(written_now)} file(s)"]
    parts += [f"{without} of them without an answer"] if without else []
    before = f" ({todo.finished} of {units} units were finished before)" if todo.finished else ""
    print(f"{', '.join(parts)}{before}")
    problems = {one.file: one.problem for one in done if one.problem}
    for file, reason in problems.items():
        print(f"error: {file}: {reason}", file=sys.stderr)
    return 2 if problems else 0


def _new_columns(table: Table) -> dict[str, str]:
    """Return the names of the columns to add; they begin with `PREFIX` if the input has a column of the same name.

    Raises:
        ValueError: it has columns of these names too.
    """
    prefix = PREFIX if any(name in table.columns for name in ADDED) else ""
    names = {name: f"{prefix}{name}" for name in ADDED}
    if doubled := [name for name in names.values() if name in table.columns]:
        raise ValueError(f"INPUT: {table.path} has a column {doubled[0]!r}, which the answers would replace; rename it")
    return names


def _summary(table: Table, answers: dict[str, list[Any]], errors: list[str], depth: int) -> str:
    """Return the number of rows, their mean exit layer, and how many have no answer."""
    layers = [layer for layer in answers["exit_layer"] if layer is not None]
    mean = f", mean exit layer {np.mean(layers):.2f} of {depth}" if layers else ""
    failed = [row for row, error in enumerate(errors) if error]
    without = f", {len(failed)} without an answer ({table.where(failed[0])}: {errors[failed[0]]})" if failed else ""
    return f"{len(table)} rows{mean}{without}"


def _answers(args: argparse.Namespace, texts: Sequence[Text]) -> tuple[dict[str, list[Any]], list[str], int]:
    """Return the columns to add, with None where there is no answer; why there is none, or empty strings; and L.

    Raises:
        ValueError: as for `scorer_of`.
    """
    scorer = scorer_of(args.model, truncate=args.truncate, max_tokens=args.max_tokens)
    table: dict[str, list[Any]] = {name: [] for name in (*ADDED, ERROR)}
    with tqdm(total=len(texts), unit="row", disable=None) as bar:
        for first in range(0, len(texts), CALL):
            part = list(texts[first : first + CALL])
            # of regression: the name of the number
            found = {"label": [scorer.model.config.id2label[0]] * len(part), **scorer(part)}
            for name, values in table.items():
                values += found[name]
            bar.update(len(part))
    table["score"] = [round(score, 6) for score in table["score"]]
    errors = [error.replace(SHORTEN_IN_PYTHON, SHORTEN) for error in table.pop(ERROR)]
    answers = {
        name: [None if error else value for value, error in zip(table[name], errors, strict=True)] for name in ADDED
    }
    return answers, errors, scorer.model.depth


def scorer_of(folder: Path, *, truncate: bool, max_tokens: int) -> Scorer:
    """Return a scorer of a saved model that reports rows without an answer; rows are as long as in training.

    Raises:
        ValueError: several labels a row, or as for `load_saved`.
    """
    saved = load_saved(folder)
    saved.check_one_label()
    with loaded_from(folder):
        options: dict[str, Any] = {"max_tokens": max_tokens, "max_length": saved.max_length}
        return Scorer(saved.model, saved.tokenizer, truncate=truncate, bad_rows="report", **options)
