"""A folder with a saved early-exit model: what its commands read, and the record of `earlyexit train` beside it."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from earlyexit_kernels.arguments import Check, number, optional, whole
from earlyexit_kernels.backends import working_device
from earlyexit_kernels.cli.checks import check_vocabulary, loaded_from
from earlyexit_kernels.data.rows import CLASSES, NUMBERS, Columns, Labels, Split, encode, read_rows
from earlyexit_kernels.data.table import read_table
from earlyexit_kernels.hf.model import EarlyExitForSequenceClassification

RECORD = "earlyexit_training.json"
#: Rows that the model was not trained on, in the columns of its training.
HELD_OUT = "heldout.parquet"


@dataclass(frozen=True)
class Record:
    """How `earlyexit train` trained a model.

    Attributes:
        data: name of the train file, without its folder.
        digest: SHA-256 of the train file.
        columns: of the file.
        rows: number of rows trained on.
        unseen: what the rows of `scores` are.
        unseen_rows: their number.
        seed: of the training.
        bf16: whether it was in bfloat16 mixed precision.
        phases: name, epochs, learning rates and number of rows of each phase.
        scores: metric values of each exit 1..L after training.
    """

    data: str
    digest: str
    columns: Columns
    rows: int
    unseen: str
    unseen_rows: int
    seed: int
    bf16: bool = False
    phases: tuple[dict[str, Any], ...] = ()
    scores: tuple[dict[str, float], ...] = field(default=())

    def save(self, folder: Path) -> None:
        """Write the record beside the model."""
        (folder / RECORD).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> Record | None:
        """Read the record of a model; None for a model that was trained in Python.

        Raises:
            ValueError: the file is not a record.
        """
        path = folder / RECORD
        if not path.is_file():
            return None
        try:
            record = Record(**json.loads(path.read_text(encoding="utf-8")))
            columns = dict(record.columns)  # type: ignore[call-overload]  # a dict in the file
            if columns.keys() != asdict(Columns()).keys():
                raise ValueError(f"expected the columns {', '.join(asdict(Columns()))}, got {', '.join(columns)}")
            record = replace(record, columns=Columns(**columns))
            for name, check in CHECKS.items():
                check(name, getattr(record, name))
            for score in record.scores:
                for name, value in score.items():
                    optional(number())(name, value)
            names = (columns["text"], columns["label"], columns["pair"] or "", columns["group"] or "")
            if not all(isinstance(text, str) for text in (record.data, record.digest, record.unseen, *names)):
                raise ValueError("expected names of a file and of columns")
        except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is not a record of this version: {error}") from error
        return record


#: Check of the numbers of a record.
CHECKS: dict[str, Check] = {"rows": whole(low=1), "unseen_rows": whole(low=0), "seed": whole(low=0)}


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass(frozen=True)
class Saved:
    """A saved model with its tokenizer, and the record of its training or None."""

    folder: Path
    model: EarlyExitForSequenceClassification
    tokenizer: Any
    record: Record | None

    @property
    def labels(self) -> Labels:
        """What the model predicts."""
        config: Any = self.model.config
        return Labels(tuple(config.id2label[i] for i in range(config.num_labels)), self.model.problem_type)

    def check_one_label(self) -> None:
        """Raise ValueError for a model of several labels a row."""
        if self.labels.problem_type not in (CLASSES, NUMBERS):
            raise ValueError(f"MODEL: expected one label a row, {self.folder} has several; use the functions in Python")

    @property
    def max_length(self) -> int:
        """Maximum tokens of a row, at which all commands cut: that of training, and what the model takes."""
        longest = self.model.adapter.longest(self.model.config.backbone_config)
        return min(int(self.tokenizer.model_max_length), longest)

    @property
    def collate(self) -> Callable[..., Any]:
        """Pads a list of encoded rows."""
        return DataCollatorWithPadding(self.tokenizer)

    def encoded(self, split: Split) -> list[dict[str, Any]]:
        """Return the token ids of rows.

        Raises:
            ValueError: the tokenizer does not know the text.
        """
        rows = encode(split, self.tokenizer, max_length=self.max_length)
        check_vocabulary(rows, self.tokenizer, self.model, self.folder)
        return rows

    def read(self, path: Path, columns: Columns) -> Split:
        """Return the rows of a file.

        Raises:
            OSError, ValueError: as for `read_table` and `read_rows`.
        """
        return read_rows(read_table(path), columns, self.labels)


def load_saved(folder: Path) -> Saved:
    """Load a model, on the GPU if there is one, and its tokenizer.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: the folder contains another model, or a file with invalid contents.
    """
    record = Record.load(folder)
    with loaded_from(folder):
        model = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True)
        if not isinstance(model, EarlyExitForSequenceClassification):
            raise ValueError(f"expected a model with exits, got a {type(model).__name__}; train it first")
    if not any(re.search("token|vocab|piece|merges", path.name) for path in folder.iterdir()):
        raise FileNotFoundError(f"MODEL: {folder} has no tokenizer; save it there with tokenizer.save_pretrained")
    with loaded_from(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return Saved(folder, model.to(working_device()).eval(), tokenizer, record)


def columns_of(args: argparse.Namespace, record: Record | None) -> Columns:
    """Return the columns asked for, or those of training.

    Raises:
        ValueError: a pair for a model that was trained on one text a row.
    """
    columns = Columns() if record is None else record.columns
    given = {name: getattr(args, f"{name}_column", None) for name in ("text", "pair", "label", "group")}
    if given["pair"] and record is not None and columns.pair is None:
        raise ValueError(
            f"--pair-column: the model was trained on one text a row, got a second one, {given['pair']!r}; leave the "
            "option out"
        )
    return replace(columns, **{name: value for name, value in given.items() if value is not None})


def unseen_rows(args: argparse.Namespace, saved: Saved) -> tuple[Split, str]:
    """Return the rows of --data, or those kept by training, and what they are.

    Raises:
        FileNotFoundError: there are neither.
        ValueError: as for `read_rows`.
    """
    saved.check_one_label()
    columns, record = columns_of(args, saved.record), saved.record
    if args.data is not None:
        if record is not None and digest_of(args.data) == record.digest:
            print(
                f"warning: --data: {args.data} is the file that the model was trained on, on whose rows it is surer "
                "than on others: what is chosen or measured here is too good. Give other rows\n"
            )
        return saved.read(args.data, columns), f"rows of {args.data.name}"
    kept = saved.folder / HELD_OUT
    if not kept.is_file():
        raise FileNotFoundError(
            f"{saved.folder} has no {HELD_OUT}, the rows that `earlyexit train` keeps; name a file of labelled rows "
            "that the model was not trained on with --data"
        )
    return saved.read(kept, columns), "held-out rows" if record is None else record.unseen
