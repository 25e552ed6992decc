"""Read the rows of a task from a folder of TSV files or from the Hugging Face hub; the tasks are in `TASK_INFOS`."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from earlyexit_kernels.data.table import FORMATS
from earlyexit_kernels.tasks.hub import offline_if_unreachable

DATA_VARIABLE = "EARLYEXIT_DATA"
HIDDEN = -1
Text: TypeAlias = str | tuple[str, str]


@dataclass(frozen=True)
class Split:
    """Rows of one split.

    Attributes:
        sentences: N texts, or N pairs of texts.
        labels: N class indices, or N numbers for a regression task; -1 if hidden.
        levels: N levels of difficulty (the generated task), else empty.
        groups: N numbers of the queries that the rows belong to, or empty.
    """

    sentences: Sequence[Text]
    labels: Sequence[float]
    levels: Sequence[int] = ()
    groups: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.sentences)

    def take(self, rows: Sequence[int]) -> Split:
        """Return the rows with these indices, in this order."""
        levels = [self.levels[i] for i in rows] if self.levels else ()
        groups = [self.groups[i] for i in rows] if self.groups else ()
        return Split([self.sentences[i] for i in rows], [self.labels[i] for i in rows], levels, groups)


@dataclass(frozen=True)
class TaskInfo:
    """Description of a task.

    Attributes:
        label_names: names of the C classes; one name for a regression task.
        metrics: names in `metrics.METRICS`; the first is the deciding metric.
        problem_type: as in transformers.
        hub: repository and configuration; an empty configuration stands for the name of the task.
        hub_revision: branch of the repository, or None for the main branch.
        hub_columns: column of the text, or columns of the two texts.
        hub_label: column of the label.
    """

    label_names: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    problem_type: str = "single_label_classification"
    hub: tuple[str, str] = ("nyu-mll/glue", "")
    hub_revision: str | None = None
    hub_columns: tuple[str, ...] = ("sentence",)
    hub_label: str = "label"


_PAIR = ("sentence1", "sentence2")
TASK_INFOS: dict[str, TaskInfo] = {
    "sst2": TaskInfo(("negative", "positive")),
    "cola": TaskInfo(("unacceptable", "acceptable"), metrics=("matthews", "accuracy")),
    "mrpc": TaskInfo(("not_equivalent", "equivalent"), metrics=("accuracy", "f1"), hub_columns=_PAIR),
    "rte": TaskInfo(("entailment", "not_entailment"), hub_columns=_PAIR),
    "stsb": TaskInfo(("similarity",), metrics=("pearson", "spearman"), problem_type="regression", hub_columns=_PAIR),
    "wnli": TaskInfo(("not_entailment", "entailment"), hub_columns=_PAIR),
    "qnli": TaskInfo(("entailment", "not_entailment"), hub_columns=("question", "sentence")),
    # the main branch has a loading script, which `datasets` no longer supports
    "trec": TaskInfo(
        ("DESC", "ENTY", "ABBR", "HUM", "LOC", "NUM"),
        hub=("CogComp/trec", "default"),
        hub_revision="refs/convert/parquet",
        hub_columns=("text",),
        hub_label="coarse_label",
    ),
}


def read_folder(name: str, folder: Path) -> dict[str, Split]:
    """Read the splits of a task from the files ``folder/name/{train,dev,test}.tsv`` that exist.

    Raises:
        FileNotFoundError: none exists.
        ValueError: a file has another format; the message names the line.
    """
    files = {split: folder / name / f"{split}.tsv" for split in ("train", "dev", "test")}
    found = {split: path for split, path in files.items() if path.is_file()}
    if not found:
        raise FileNotFoundError(
            f"task {name!r}: expected train.tsv, dev.tsv or test.tsv in {folder / name} ({DATA_VARIABLE}={folder}), "
            "found none; correct the variable, or unset it to load the task from the Hugging Face hub"
        )
    return {split: _read_tsv(path, TASK_INFOS[name]) for split, path in found.items()}


def _read_tsv(path: Path, info: TaskInfo) -> Split:
    table = FORMATS[".tsv"].read(path)
    names = _PAIR if "sentence1" in table.columns else ("sentence",)
    if not {"label", *names} <= set(table.columns):
        raise ValueError(
            f"{path}, line 1: expected a header with idx, label and sentence (or sentence1, sentence2), got "
            f"{reprlib.repr(list(table.columns))}"
        )
    if not len(table):
        raise ValueError(f"{path}, line 2: expected at least one row below the header, got none")
    columns = [table.columns[name] for name in names]
    labels = [_label(value, info, table.where(row)) for row, value in enumerate(table.columns["label"])]
    return Split(list(columns[0]) if len(columns) == 1 else list(zip(*columns, strict=True)), labels)


def _label(value: Any, info: TaskInfo, where: str) -> float:
    regression = info.problem_type == "regression"
    try:
        label = float(value) if regression else int(value)
    except (TypeError, ValueError):
        label = math.nan
    if not math.isfinite(label):
        raise ValueError(f"{where}: expected a number as label, got {reprlib.repr(value)}")
    if not regression and not HIDDEN <= label < len(info.label_names):
        raise ValueError(f"{where}: expected a label in [-1, {len(info.label_names) - 1}], got {reprlib.repr(value)}")
    return label


def read_hub(name: str, *, ask_hub: Callable[[], str] | None = None) -> dict[str, Split]:
    """Load the splits of a task with `datasets`.

    Args:
        name: one of `TASK_INFOS`.
        ask_hub: as for `offline_if_unreachable`.

    Raises:
        ImportError: `datasets` is not installed.
        ConnectionError: the hub cannot be reached or refuses the request.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"task {name!r} is loaded from the Hugging Face hub, which requires "
            f"`pip install datasets`; or set {DATA_VARIABLE} to a folder with {name}/train.tsv"
        ) from error
    info = TASK_INFOS[name]
    path, config = info.hub
    with offline_if_unreachable(ask_hub) as reason:
        try:
            data = load_dataset(path, config or name, revision=info.hub_revision)
        except Exception as error:  # the client raises many classes: no network, no such branch, the page of a proxy
            raise ConnectionError(
                f"task {name!r}: {path} could not be loaded from the Hugging Face hub "
                f"({reason or f'{type(error).__name__}: {error}'}); connect, or set {DATA_VARIABLE} to a folder "
                f"with {name}/train.tsv"
            ) from error
    names = {"train": "train", "validation": "dev", "test": "test"}
    return {names[split]: _hub_split(rows, info, path) for split, rows in data.items() if split in names}


def _hub_split(rows: Any, info: TaskInfo, path: str) -> Split:
    columns = [list(rows[column]) for column in info.hub_columns]
    names = getattr(rows.features[info.hub_label], "names", None)
    labels = [_label(label, info, path) for label in rows[info.hub_label]]
    if names is not None and set(names) == set(info.label_names):
        # number the classes as in `label_names`, whatever their order on the hub
        labels = [label if label == HIDDEN else info.label_names.index(names[int(label)]) for label in labels]
    return Split(columns[0] if len(columns) == 1 else list(zip(*columns, strict=True)), labels)
