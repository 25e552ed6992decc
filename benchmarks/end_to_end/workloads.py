"""The batches that are timed: rows of one length, and SST-2's natural mix of lengths."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.end_to_end.models import NotMeasuredError, Subject, device
from earlyexit_kernels.tasks.load import load_task
from earlyexit_kernels.tasks.sources import DATA_VARIABLE


@dataclass(frozen=True)
class Workload:
    """Batches to answer one after the other.

    Attributes:
        name: in words.
        batches: ``input_ids`` and ``attention_mask`` ``[N, S]`` each, padded on the right.
    """

    name: str
    batches: tuple[dict[str, Tensor], ...]

    @property
    def rows(self) -> int:
        """Rows of all batches."""
        return sum(batch["input_ids"].shape[0] for batch in self.batches)

    @property
    def tokens(self) -> float:
        """Share of the padded batches that is tokens."""
        masks = [batch["attention_mask"] for batch in self.batches]
        return sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


@dataclass(frozen=True)
class Fixed:
    """Rows of one length.

    Attributes:
        rows, length: B and S.
    """

    rows: int
    length: int

    @property
    def name(self) -> str:
        """In words."""
        return f"B {self.rows}, S {self.length}"

    def build(self, subject: Subject) -> Workload:
        """One batch of random ids and a mask of ones, as a tokenizer gives them."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1, subject.vocabulary, (self.rows, self.length), generator=generator).to(device())
        return Workload(self.name, ({"input_ids": ids, "attention_mask": torch.ones_like(ids)},))


@dataclass(frozen=True)
class Ragged:
    """Rows of lengths from 4 to 35 in equal numbers, where there is no text data.

    Attributes:
        rows: B.
    """

    rows: int

    @property
    def name(self) -> str:
        """In words."""
        return f"B {self.rows}, S 4 to 35"

    def build(self, subject: Subject) -> Workload:
        """One padded batch of random ids."""
        generator = torch.Generator().manual_seed(0)
        lengths = [4 + 7 * row % 32 for row in range(self.rows)]
        ids = [torch.randint(1, subject.vocabulary, (n,), generator=generator).to(device()) for n in lengths]
        return Workload(self.name, (padded(ids),))


@dataclass(frozen=True)
class Sst2:
    """Rows with the lengths of SST-2's dev sentences.

    Attributes:
        rows: B.
        batches: how many.
    """

    rows: int
    batches: int

    @property
    def name(self) -> str:
        """In words."""
        return f"B {self.rows}, SST-2 lengths"

    def build(self, subject: Subject) -> Workload:
        """Of the batches that the file's order gives, those with the most usual share of tokens, in order.

        Raises:
            NotMeasuredError: the data isn't there.
        """
        queries = sst2_queries(subject)
        starts = range(0, len(queries) - self.rows + 1, self.rows)
        found = [Workload("", (padded(queries[i : i + self.rows]),)) for i in starts]
        usual = sum(work.tokens for work in found) / len(found)
        nearest = sorted(range(len(found)), key=lambda i: abs(found[i].tokens - usual))[: self.batches]
        return Workload(self.name, tuple(found[i].batches[0] for i in sorted(nearest)))


def sst2_queries(subject: Subject) -> list[Tensor]:
    """Token ids ``[S]`` of SST-2's dev rows: tokenised for a trained model, else random ids, two more than words.

    Raises:
        NotMeasuredError: the data isn't there.
    """
    if not os.environ.get(DATA_VARIABLE):
        raise NotMeasuredError(f"{DATA_VARIABLE} isn't set; it names a folder with sst2/dev.tsv")
    sentences: Sequence[Any] = load_task("sst2").split("dev").sentences
    if subject.tokenizer is not None:
        return [torch.tensor(ids, device=device()) for ids in subject.tokenizer(list(sentences))["input_ids"]]
    generator = torch.Generator().manual_seed(0)
    lengths = [len(sentence.split()) + 2 for sentence in sentences]
    return [torch.randint(1, subject.vocabulary, (n,), generator=generator).to(device()) for n in lengths]


def padded(queries: Sequence[Tensor]) -> dict[str, Tensor]:
    """One batch of rows ``[S]`` of any lengths."""
    ids = pad_sequence(list(queries), batch_first=True)
    lengths = torch.tensor([len(query) for query in queries], device=ids.device)
    mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    return {"input_ids": ids, "attention_mask": mask.long()}
