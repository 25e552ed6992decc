"""Text classification tasks: the generated one, a folder of TSV files, or the Hugging Face hub.

The environment variable EARLYEXIT_DATA names a folder with ``<task>/{train,dev,test}.tsv``: UTF-8, one header row,
tab-separated without quoting, columns ``idx label sentence`` or ``idx label sentence1 sentence2``. A label is an
integer class, a number for a regression task, or -1 if hidden. Without the variable, the same tasks are loaded from the
hub with `datasets` (extra ``train``).
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from earlyexit_kernels.data import toy
from earlyexit_kernels.tasks.sources import DATA_VARIABLE, HIDDEN, TASK_INFOS, Split, read_folder, read_hub


@dataclass(frozen=True)
class Task:
    """A text classification task.

    Attributes:
        name: argument of `load_task`.
        splits: ``"train"``, ``"dev"`` and ``"test"`` -> rows; without the splits that the source lacks.
        label_names: names of the C classes; one name for a regression task.
        metrics: names in `metrics.METRICS`; the first is the deciding metric.
        problem_type: as in transformers.
        source: origin of the rows, for messages and reports.
        hidden: label of rows whose label is hidden, or None if none is.
    """

    name: str
    splits: Mapping[str, Split]
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]
    problem_type: str
    source: str
    hidden: int | None = HIDDEN

    @property
    def num_labels(self) -> int:
        """Number of classes C, the width of the logits."""
        return len(self.label_names)

    @property
    def metric(self) -> str:
        """The deciding metric."""
        return self.metrics[0]

    def split(self, name: str) -> Split:
        """Return a split with visible labels.

        Raises:
            ValueError: the split is missing or empty, or its labels are hidden.
        """
        if name not in self.splits:
            raise ValueError(f"task {self.name!r} has no {name!r} split in {self.source}; it has {list(self.splits)}")
        split = self.splits[name]
        if not len(split):
            raise ValueError(f"the {name!r} split of task {self.name!r} in {self.source} has no rows")
        if any(label == self.hidden for label in split.labels):
            raise ValueError(
                f"the labels of the {name!r} split of task {self.name!r} are hidden (-1), so it cannot be trained or "
                f"evaluated on; splits: {list(self.splits)}"
            )
        return split

    @property
    def evaluation(self) -> str:
        """Name of the split to report on: dev, or test if there is no dev split (TREC)."""
        return "dev" if "dev" in self.splits else "test"


TASK_NAMES = ("toy", *TASK_INFOS)


def load_task(name: str, *, seed: int = 0, ask_hub: Callable[[], str] | None = None) -> Task:
    """Load a task by name.

    Args:
        name: one of `TASK_NAMES`; ``"toy"`` is generated, the others are read from the folder EARLYEXIT_DATA if the
            variable is set, else from the hub.
        seed: seed of the generated task; ignored for the others.
        ask_hub: as for `hub.offline_if_unreachable`.

    Raises:
        ValueError: the name is unknown, or a file has another format.
        FileNotFoundError: the folder does not have the task.
        ImportError: the hub is required and `datasets` is not installed.
        ConnectionError: the hub cannot be reached or refuses the request.
    """
    if name == "toy":
        return _toy_task(seed)
    if name not in TASK_INFOS:
        raise ValueError(f"task: expected one of {list(TASK_NAMES)}, got {name!r}")
    info, folder = TASK_INFOS[name], os.environ.get(DATA_VARIABLE)
    if folder:
        splits, source = read_folder(name, Path(folder)), f"{DATA_VARIABLE}={folder}"
    else:
        splits, source = read_hub(name, ask_hub=ask_hub), f"hub {info.hub[0]}"
    return Task(name, splits, info.label_names, info.metrics, info.problem_type, source)


def _toy_task(seed: int) -> Task:
    splits, source = toy_splits(seed=seed), f"the generator, seed {seed}"
    return Task("toy", splits, toy.LABEL_NAMES, ("accuracy",), "single_label_classification", source)


def toy_splits(*, seed: int = 0, **rows: int) -> dict[str, Split]:
    """Return the splits of the generated task; arguments as for `toy.write_splits`."""
    written = toy.write_splits(seed=seed, **rows)
    return {
        name: Split([s.text for s in sentences], [s.label for s in sentences], [s.level for s in sentences])
        for name, sentences in written.items()
    }


def holdout(split: Split, rows: int, *, seed: int = 0) -> tuple[Split, Split]:
    """Split off held-out rows; the same seed gives the same rows on every machine.

    Args:
        split: N rows.
        rows: number of rows to hold out, in ``[0, N)``. Rows of one query stay together: as many queries are held out
            as are needed for this number of rows.
        seed: random seed.

    Returns:
        the remaining rows, in drawn order, and the held-out rows.

    Raises:
        ValueError: `rows` is out of range, or no query is left.
    """
    if not 0 <= rows < len(split):
        raise ValueError(f"holdout: expected rows in [0, {len(split) - 1}], got {rows}")
    draw = random.Random(seed).random
    keys = [draw() for _ in range(len(split))]
    if split.groups:
        first = dict(zip(reversed(split.groups), reversed(keys), strict=True))
        keys = [first[group] for group in split.groups]
    order = sorted(range(len(split)), key=keys.__getitem__)
    while split.groups and 0 < rows < len(order) and keys[order[rows - 1]] == keys[order[rows]]:
        rows += 1  # to the end of the query
    if rows == len(order):
        raise ValueError(f"holdout: expected fewer rows, the queries of {rows} rows are all that there are")
    return split.take(order[rows:]), split.take(order[:rows])


class EncodedSplit(Dataset):
    """Token ids of a split, without padding (pad with `transformers.DataCollatorWithPadding`)."""

    def __init__(self, encodings: Mapping[str, Sequence[Sequence[int]]], labels: Sequence[float]) -> None:
        self._encodings = encodings
        self._labels = labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {**{name: values[row] for name, values in self._encodings.items()}, "labels": self._labels[row]}


def encode(split: Split, tokenizer: Any, *, max_length: int | None = None) -> EncodedSplit:
    """Tokenise a split.

    Args:
        split: N texts or pairs.
        tokenizer: a tokenizer from transformers.
        max_length: maximum tokens per row; longer rows are truncated (default: the limit of the tokenizer).

    Returns:
        N dicts of the tokenizer's outputs and ``labels``, without padding.
    """
    pairs = len(split) > 0 and not isinstance(split.sentences[0], str)
    first, second = zip(*split.sentences, strict=True) if pairs else (split.sentences, None)
    texts = [list(first)] if second is None else [list(first), list(second)]
    encodings = tokenizer(*texts, truncation=True, max_length=max_length)
    return EncodedSplit({name: encodings[name] for name in encodings}, list(split.labels))
