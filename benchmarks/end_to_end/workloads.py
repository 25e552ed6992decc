"""The batches that are timed: rows of one length, generated ragged rows, and SST-2's natural lengths."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.end_to_end.models import Subject
from benchmarks.machine import DATA_VARIABLE, NotMeasuredError, device

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Workload:
    """Batches to answer one after the other: ``input_ids`` and ``attention_mask`` ``[N, S]``, padded on the right."""

    name: str
    batches: tuple[Batch, ...]

    @property
    def rows(self) -> int:
        """Number of rows of all batches."""
        return sum(batch["input_ids"].shape[0] for batch in self.batches)

    @property
    def tokens(self) -> float:
        """Share of the padded batches that is tokens."""
        masks = [batch["attention_mask"] for batch in self.batches]
        return sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def _random_rows(subject: Subject, lengths: Sequence[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, subject.vocabulary, (n,), generator=generator).to(device()) for n in lengths]


@dataclass(frozen=True)
class Fixed:
    """One batch of B rows of S random tokens, with a mask of ones as a tokenizer gives it."""

    rows: int
    length: int

    @property
    def name(self) -> str:
        """Name in records."""
        return f"B {self.rows}, S {self.length}"

    def build(self, subject: Subject) -> Workload:
        """Return the batch."""
        ids = torch.stack(_random_rows(subject, [self.length] * self.rows))
        return Workload(self.name, ({"input_ids": ids, "attention_mask": torch.ones_like(ids)},))


@dataclass(frozen=True)
class Ragged:
    """One batch of B rows of 4 to 35 random tokens, every length equally often; needs no text data."""

    rows: int

    @property
    def name(self) -> str:
        """Name in records."""
        return f"B {self.rows}, S 4 to 35"

    def build(self, subject: Subject) -> Workload:
        """Return the padded batch."""
        return Workload(self.name, (padded(_random_rows(subject, [4 + 7 * row % 32 for row in range(self.rows)])),))


@dataclass(frozen=True)
class Sst2:
    """Batches of B rows with the lengths of SST-2's dev sentences.

    Attributes:
        rows: B.
        batches: number of batches: of those in the file's order, the ones whose share of padding is most usual.
    """

    rows: int
    batches: int

    @property
    def name(self) -> str:
        """Name in records."""
        return f"B {self.rows}, SST-2 lengths"

    def build(self, subject: Subject) -> Workload:
        """Return the batches.

        Raises:
            NotMeasuredError: the data is not there.
        """
        queries = sst2_queries(subject)
        starts = range(0, len(queries) - self.rows + 1, self.rows)
        found = [Workload("", (padded(queries[i : i + self.rows]),)) for i in starts]
        usual = sum(work.tokens for work in found) / len(found)
        nearest = sorted(range(len(found)), key=lambda i: abs(found[i].tokens - usual))[: self.batches]
        return Workload(self.name, tuple(found[i].batches[0] for i in sorted(nearest)))


#: Builds a workload for a model.
Work: TypeAlias = Fixed | Ragged | Sst2


def sst2_queries(subject: Subject) -> list[Tensor]:
    """Return token ids ``[S]`` of SST-2's dev rows: tokenised for a trained model, else random, two more than words.

    Raises:
        NotMeasuredError: the data is not there.
    """
    path = Path(os.environ.get(DATA_VARIABLE, "")) / "sst2" / "dev.tsv"
    if not path.is_file():
        raise NotMeasuredError(f"{DATA_VARIABLE} has to name a folder with sst2/dev.tsv")
    with path.open(encoding="utf-8", newline="") as file:  # not by the package: `benchmarks.compare` runs older ones
        sentences = [row["sentence"] for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
    if subject.tokenizer is not None:
        return [torch.tensor(ids, device=device()) for ids in subject.tokenizer(sentences)["input_ids"]]
    return _random_rows(subject, [len(sentence.split()) + 2 for sentence in sentences])


def padded(queries: Sequence[Tensor]) -> Batch:
    """Return one padded batch of rows ``[S]`` of any lengths."""
    ids = pad_sequence(list(queries), batch_first=True)
    lengths = torch.tensor([len(query) for query in queries], device=ids.device)
    mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    return {"input_ids": ids, "attention_mask": mask.long()}
