"""Public text classification tasks, read from a folder: GLUE's and TREC.

The environment variable EARLYEXIT_DATA names a folder with ``<task>/{train,dev,test}.tsv``: UTF-8, one header row,
tab-separated without quoting, columns ``idx label sentence`` or ``idx label sentence1 sentence2``. A label is an
integer class, a number for a regression task, or -1 if hidden.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import DATA_VARIABLE, NotMeasuredError
from earlyexit_kernels.cli.saved import HELD_OUT, Saved
from earlyexit_kernels.data.rows import CLASSES, NUMBERS, Columns, Labels, Split, hold_out, read_rows
from earlyexit_kernels.data.table import read_table, write_table


@dataclass(frozen=True)
class Task:
    """A task: its number of classes (1: a number), its deciding metric, and whether a row is a pair of texts."""

    classes: int = 2
    metric: str = "accuracy"
    pairs: bool = False


TASKS = {
    "sst2": Task(),
    "cola": Task(metric="matthews"),
    "mrpc": Task(pairs=True),
    "rte": Task(pairs=True),
    "stsb": Task(1, "pearson", pairs=True),
    "wnli": Task(pairs=True),
    "qnli": Task(pairs=True),
    "trec": Task(6),
}


def read_split(task: str, split: str) -> Split:
    """Return the rows of a split, with the number of the class as label; ``"dev"`` is test for TREC, which has none.

    Raises:
        NotMeasuredError: EARLYEXIT_DATA does not name a folder with the file.
    """
    name = "test" if (task, split) == ("trec", "dev") else split
    folder = os.environ.get(DATA_VARIABLE)
    path = Path(folder or "") / task / f"{name}.tsv"
    if not folder or not path.is_file():
        raise NotMeasuredError(f"{DATA_VARIABLE} has to name a folder with {task}/{name}.tsv")
    info = TASKS[task]
    labels = Labels(("label",), NUMBERS)
    if info.classes > 1:
        labels = Labels(tuple(map(str, range(info.classes))), CLASSES)
    columns = Columns("sentence1", "sentence2") if info.pairs else Columns("sentence")
    return read_rows(read_table(path), columns, labels)


def write_files(task: str, folder: Path, *, rows: int, holdout: int, seed: int) -> dict[str, Path]:
    """Write the rows to train on, to choose settings on and to report on as CSV files.

    Args:
        task: one of `TASKS`.
        folder: for the files; those that exist are kept.
        rows: number of rows to train on.
        holdout: number of train rows to choose settings on.
        seed: of the draw.

    Returns:
        the files by name: ``"train"``, ``"tuning"`` and ``"reporting"``.
    """
    files = {name: folder / f"{name}.csv" for name in ("train", "tuning", "reporting")}
    if all(file.is_file() for file in files.values()):
        return files
    folder.mkdir(parents=True, exist_ok=True)
    train = read_split(task, "train")
    rest, held = hold_out(train, holdout, seed=seed)
    splits = {"train": train.take(rest[:rows]), "tuning": train.take(held), "reporting": reported_rows(task)}
    for name, split in splits.items():
        files[name].unlink(missing_ok=True)
        write_table(files[name], split_table(split))
    return files


#: Tasks whose test labels are public.
LABELLED_TEST = ("sst2", "mrpc", "stsb")


def reported_rows(task: str) -> Split:
    """Return the rows to report on: dev, with test where its labels are public, without rows that stand in train."""
    splits = [read_split(task, split) for split in ("dev", *(["test"] if task in LABELLED_TEST else []))]
    joined = Split([t for s in splits for t in s.texts], [label for s in splits for label in s.labels])
    known = set(read_split(task, "train").texts)
    return joined.take([number for number, text in enumerate(joined.texts) if text not in known])


def rows_of_model(saved: Saved, task: str = "sst2") -> dict[str, Split]:
    """Return the rows that a model of a task was not trained on, to choose settings on, and the rows to report on.

    Raises:
        NotMeasuredError: the model is not of `earlyexit train` or has other classes, or the data is not there.
    """
    classes = saved.model.config.num_labels
    if classes != TASKS[task].classes:
        raise NotMeasuredError(
            f"expected a model of {task}, {TASKS[task].classes} classes; {saved.folder} has {classes}"
        )
    kept = saved.folder / HELD_OUT
    if saved.record is None or not kept.is_file():
        raise NotMeasuredError(f"{saved.folder} has no {HELD_OUT}, which `earlyexit train` writes")
    return {"tuning": saved.read(kept, saved.record.columns), "reporting": read_split(task, "dev")}


def split_table(split: Split) -> dict[str, list[Any]]:
    """Return the rows as the columns of a file: ``text``, for pairs also ``pair``, and ``label``."""
    pairs = not isinstance(split.texts[0], str)
    table: dict[str, list[Any]] = {"text": [text[0] if pairs else text for text in split.texts]}
    table |= {"pair": [text[1] for text in split.texts]} if pairs else {}
    return {**table, "label": list(split.labels)}
