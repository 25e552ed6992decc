"""Text classification tasks: the generated one, a folder of TSV files, or the Hugging Face hub.

A folder, named by the variable EARLYEXIT_DATA, holds ``<task>/{train,dev,test}.tsv``: UTF-8, one header row, TAB
separated without quoting, columns ``idx label sentence`` or ``idx label sentence1 sentence2``; the label is an integer
class, a number for a regression task, and -1 where it is hidden. Without the variable the same tasks come from the hub
through `datasets` (extra ``train``).
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from earlyexit_kernels.tasks import toy
from earlyexit_kernels.tasks.sources import DATA_VARIABLE, ENTRIES, HIDDEN, Split, read_folder, read_hub


@dataclass(frozen=True)
class Task:
    """A text classification task.

    Attributes:
        name: as `load_task` takes it.
        splits: by name: ``"train"``, ``"dev"``, ``"test"``, as far as the source has them.
        label_names: of the C classes; one name for a regression task.
        metrics: names in `metrics.METRICS`; the first one decides.
        problem_type: as in transformers.
        source: where the rows come from, for messages and reports.
    """

    name: str
    splits: Mapping[str, Split]
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]
    problem_type: str
    source: str

    @property
    def num_labels(self) -> int:
        """C, the width of the logits."""
        return len(self.label_names)

    @property
    def metric(self) -> str:
        """The metric that decides."""
        return self.metrics[0]

    def split(self, name: str) -> Split:
        """A split with visible labels.

        Raises:
            ValueError: the task lacks the split, or it has no rows, or its labels are hidden.
        """
        if name not in self.splits:
            raise ValueError(f"task {self.name!r} has no {name!r} split in {self.source}; it has {list(self.splits)}")
        split = self.splits[name]
        if not len(split):
            raise ValueError(f"the {name!r} split of task {self.name!r} in {self.source} has no rows")
        if any(label == HIDDEN for label in split.labels):
            raise ValueError(
                f"the labels of the {name!r} split of task {self.name!r} are hidden (-1), so nothing can be trained or "
                f"measured on it; splits: {list(self.splits)}"
            )
        return split

    @property
    def evaluation(self) -> str:
        """Name of the split to report on: dev, or test where there is no dev (TREC)."""
        return "dev" if "dev" in self.splits else "test"


TASK_NAMES = ("toy", *ENTRIES)


def load_task(name: str, *, seed: int = 0) -> Task:
    """Load a task by name.

    Args:
        name: ``"toy"``, or a task of `TASK_NAMES`, read from the folder named by EARLYEXIT_DATA if that is set, else
            from the hub.
        seed: of the generated task; the others ignore it.

    Raises:
        ValueError: an unknown name, or a file that isn't in the format.
        FileNotFoundError: the folder lacks the task.
        ImportError: the hub is needed and `datasets` isn't installed.
        ConnectionError: the hub can't be reached or refuses.
    """
    if name == "toy":
        return _toy_task(seed)
    if name not in ENTRIES:
        raise ValueError(f"task: expected one of {list(TASK_NAMES)}, got {name!r}")
    entry, folder = ENTRIES[name], os.environ.get(DATA_VARIABLE)
    if folder:
        splits, source = read_folder(name, Path(folder)), f"{DATA_VARIABLE}={folder}"
    else:
        splits, source = read_hub(name), f"hub {entry.hub[0]}"
    return Task(name, splits, entry.label_names, entry.metrics, entry.problem_type, source)


def _toy_task(seed: int) -> Task:
    splits, source = toy_splits(seed=seed), f"the generator, seed {seed}"
    return Task("toy", splits, toy.LABEL_NAMES, ("accuracy",), "single_label_classification", source)


def toy_splits(*, seed: int = 0, **rows: int) -> dict[str, Split]:
    """The generated task's splits; arguments as for `toy.write_splits`."""
    written = toy.write_splits(seed=seed, **rows)
    return {
        name: Split([s.text for s in sentences], [s.label for s in sentences], [s.level for s in sentences])
        for name, sentences in written.items()
    }


def holdout(split: Split, rows: int, *, seed: int = 0) -> tuple[Split, Split]:
    """Part a split in two, the same way for the same seed on every machine.

    Args:
        split: N rows.
        rows: rows to hold out, in ``[0, N)``.
        seed: of the draw.

    Returns:
        the rest, in drawn order, and the rows held out.

    Raises:
        ValueError: more rows asked for than the split can give.
    """
    if not 0 <= rows < len(split):
        raise ValueError(f"holdout: expected rows in [0, {len(split) - 1}], got {rows}")
    draw = random.Random(seed).random
    keys = [draw() for _ in range(len(split))]
    order = sorted(range(len(split)), key=keys.__getitem__)
    return split.take(order[rows:]), split.take(order[:rows])


class EncodedSplit(Dataset):
    """Token ids of a split, unpadded: pad with `transformers.DataCollatorWithPadding`."""

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
        tokenizer: of transformers.
        max_length: longer rows are cut to it; default: the tokenizer's own limit.

    Returns:
        N dicts of the tokenizer's outputs and ``labels``, without padding.
    """
    pairs = len(split) > 0 and not isinstance(split.sentences[0], str)
    first, second = zip(*split.sentences, strict=True) if pairs else (split.sentences, None)
    texts = [list(first)] if second is None else [list(first), list(second)]
    encodings = tokenizer(*texts, truncation=True, max_length=max_length)
    return EncodedSplit({name: encodings[name] for name in encodings}, list(split.labels))
