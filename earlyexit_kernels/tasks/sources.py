"""Where the rows of a task come from: a folder of TSV files, or the Hugging Face hub; one entry a task in `ENTRIES`."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from earlyexit_kernels.tasks.hub import offline_if_unreachable

DATA_VARIABLE = "EARLYEXIT_DATA"
HIDDEN = -1
Text: TypeAlias = str | tuple[str, str]


@dataclass(frozen=True)
class Split:
    """Rows of one split.

    Attributes:
        sentences: N texts, or N pairs of texts.
        labels: N class indices, or N numbers in a regression task; -1 where hidden.
        levels: N levels of difficulty where the task knows them, else empty.
    """

    sentences: Sequence[Text]
    labels: Sequence[float]
    levels: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.sentences)

    def take(self, rows: Sequence[int]) -> Split:
        """The rows with these indices, in this order."""
        levels = [self.levels[i] for i in rows] if self.levels else ()
        return Split([self.sentences[i] for i in rows], [self.labels[i] for i in rows], levels)


@dataclass(frozen=True)
class Entry:
    """What is known of a task before its rows are read.

    Attributes:
        label_names: of the C classes; one name for a regression task.
        metrics: names in `metrics.METRICS`; the first one decides.
        problem_type: as in transformers.
        hub: repository and configuration; an empty configuration is the task's name.
        hub_revision: branch of the repository, or None for the main one.
        hub_columns: of the text, or of the two texts.
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
ENTRIES: dict[str, Entry] = {
    "sst2": Entry(("negative", "positive")),
    "cola": Entry(("unacceptable", "acceptable"), metrics=("matthews", "accuracy")),
    "mrpc": Entry(("not_equivalent", "equivalent"), metrics=("accuracy", "f1"), hub_columns=_PAIR),
    "rte": Entry(("entailment", "not_entailment"), hub_columns=_PAIR),
    "stsb": Entry(("similarity",), metrics=("pearson", "spearman"), problem_type="regression", hub_columns=_PAIR),
    "wnli": Entry(("not_entailment", "entailment"), hub_columns=_PAIR),
    "qnli": Entry(("entailment", "not_entailment"), hub_columns=("question", "sentence")),
    # the main branch keeps a loading script, which `datasets` no longer runs
    "trec": Entry(
        ("DESC", "ENTY", "ABBR", "HUM", "LOC", "NUM"),
        hub=("CogComp/trec", "default"),
        hub_revision="refs/convert/parquet",
        hub_columns=("text",),
        hub_label="coarse_label",
    ),
}


def read_folder(name: str, folder: Path) -> dict[str, Split]:
    """Read the splits of a task from ``folder/name/{train,dev,test}.tsv``, as many as there are.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a file isn't in the format; the message names the line.
    """
    files = {split: folder / name / f"{split}.tsv" for split in ("train", "dev", "test")}
    found = {split: path for split, path in files.items() if path.is_file()}
    if not found:
        raise FileNotFoundError(
            f"task {name!r}: expected train.tsv, dev.tsv or test.tsv in {folder / name} ({DATA_VARIABLE}={folder}), "
            "found none; correct the variable, or unset it to load the task from the Hugging Face hub"
        )
    return {split: _read_tsv(path, ENTRIES[name]) for split, path in found.items()}


def _read_tsv(path: Path, entry: Entry) -> Split:
    lines = _lines(path)
    header = next(lines, "").split("\t")
    columns = _PAIR if "sentence1" in header else ("sentence",)
    if "label" not in header or not set(columns) <= set(header):
        raise ValueError(
            f"{path}, line 1: expected a header with idx, label and sentence (or sentence1, sentence2), got "
            f"{_shown(header)}"
        )
    at = [header.index(column) for column in columns]
    sentences: list[Text] = []
    labels: list[float] = []
    for number, line in enumerate(lines, start=2):
        row, where = line.split("\t"), f"{path}, line {number}"
        if len(row) != len(header):
            raise ValueError(f"{where}: expected {len(header)} columns, got {len(row)}")
        sentences.append(row[at[0]] if len(at) == 1 else (row[at[0]], row[at[1]]))
        labels.append(_label(row[header.index("label")], entry, where))
    if not labels:
        raise ValueError(f"{path}, line 2: expected at least one row below the header, got none")
    return Split(sentences, labels)


def _lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, without their ends; a byte order mark is skipped.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8; the message names the line.
    """
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: expected UTF-8 text, got the byte {data[error.start]:#04x}") from None
    return (line.rstrip("\n") for line in io.StringIO(text.removeprefix("\ufeff"), newline=None))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _label(value: Any, entry: Entry, where: str) -> float:
    regression = entry.problem_type == "regression"
    try:
        label = float(value) if regression else int(value)
    except (TypeError, ValueError):
        label = math.nan
    if not math.isfinite(label):
        raise ValueError(f"{where}: expected a number as label, got {_shown(value)}")
    if not regression and not HIDDEN <= label < len(entry.label_names):
        raise ValueError(f"{where}: expected a label in [-1, {len(entry.label_names) - 1}], got {_shown(value)}")
    return label


def read_hub(name: str) -> dict[str, Split]:
    """Load the splits of a task through `datasets`.

    Raises:
        ImportError: `datasets` isn't installed.
        ConnectionError: the hub can't be reached or refuses.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"task {name!r} comes from the Hugging Face hub, which needs `pip install earlyexit_kernels[train]`; or "
            f"let {DATA_VARIABLE} name a folder that holds {name}/train.tsv"
        ) from error
    entry = ENTRIES[name]
    path, config = entry.hub
    with offline_if_unreachable() as reason:
        try:
            data = load_dataset(path, config or name, revision=entry.hub_revision)
        except Exception as error:  # whatever the hub's client raises: no network, no such branch, a proxy's page
            raise ConnectionError(
                f"task {name!r}: the Hugging Face hub didn't give {path} "
                f"({reason or f'{type(error).__name__}: {error}'}); connect, or let {DATA_VARIABLE} name a folder that "
                f"holds {name}/train.tsv"
            ) from error
    ours = {"train": "train", "validation": "dev", "test": "test"}
    return {ours[split]: _hub_split(rows, entry, path) for split, rows in data.items() if split in ours}


def _hub_split(rows: Any, entry: Entry, path: str) -> Split:
    columns = [list(rows[column]) for column in entry.hub_columns]
    names = getattr(rows.features[entry.hub_label], "names", None)
    labels = [_label(label, entry, path) for label in rows[entry.hub_label]]
    if names is not None and set(names) == set(entry.label_names):
        # one numbering of the classes, whatever the source's order
        labels = [label if label == HIDDEN else entry.label_names.index(names[int(label)]) for label in labels]
    return Split(columns[0] if len(columns) == 1 else list(zip(*columns, strict=True)), labels)
