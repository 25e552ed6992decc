"""How the rows of a worker share its steps: the interface, and whole batches, the simplest of them.

A scheduler takes rows, and each step returns the answers that became final. A step in which the model raises is run
again row by row, so that a row on which it fails leaves its neighbours alone.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import torch

from earlyexit_kernels.hf.model import EarlyExitForSequenceClassification
from earlyexit_kernels.hf.predict import PadRight
from earlyexit_kernels.serving.protocol import Found, Row
from earlyexit_kernels.types import Answers

logger = logging.getLogger("earlyexit_kernels")


class Done(NamedTuple):
    """What a step has finished: answers, and the keys of rows on which the model failed."""

    answers: list[Found]
    failed: list[int]


class Scheduler(Protocol):
    """What a worker asks of a scheduler."""

    @property
    def busy(self) -> bool:
        """Whether there are rows without an answer."""

    def add(self, rows: Iterable[Row]) -> None:
        """Take further rows."""

    def drop(self, keys: Iterable[int]) -> list[int]:
        """Remove rows, at least those that have not begun, and return the keys of the removed ones."""

    def step(self) -> Done:
        """Run a part of the rows, of which there are some."""


class WholeBatches:
    """Batches of the rows that wait, in the order of their arrival; each ends before the next begins.

    Args:
        model: in eval mode.
        max_tokens: of a batch, without padding; a longer row gets a batch of its own.
        stream: return answers as rows leave the batch, instead of all at its end.
    """

    def __init__(self, model: EarlyExitForSequenceClassification, max_tokens: int, *, stream: bool) -> None:
        self.model, self.max_tokens = model, max_tokens
        self._run = self._streamed if stream else self._at_once
        self._collate = PadRight.of(model)
        self._waiting: deque[Row] = deque()
        self._batch: dict[int, Row] = {}
        self._parts: Iterator[list[Found]] = iter(())

    @property
    def busy(self) -> bool:
        """Whether there are rows without an answer."""
        return bool(self._waiting or self._batch)

    def add(self, rows: Iterable[Row]) -> None:
        """Take further rows."""
        self._waiting.extend(rows)

    def drop(self, keys: Iterable[int]) -> list[int]:
        """Remove rows that have not begun, and return their keys."""
        return taken_out(self._waiting, set(keys))

    def step(self) -> Done:
        """Run until rows are answered."""
        try:
            if not self._batch:
                self._batch = {row.key: row for row in self._next_rows()}
                self._parts = self._run(list(self._batch.values()))
            answers = next(self._parts)
        except torch.AcceleratorError:
            raise  # after an error of the device nothing runs in this process
        except Exception:
            rows, self._batch = list(self._batch.values()), {}
            return one_by_one(self._at_once, rows)
        for answer in answers:
            del self._batch[answer.key]
        return Done(answers, [])

    def _next_rows(self) -> list[Row]:
        """Take the first rows that fit a batch, at least one."""
        rows = [self._waiting.popleft()]
        tokens = len(rows[0].input_ids)
        while self._waiting and tokens + len(self._waiting[0].input_ids) <= self.max_tokens:
            rows.append(self._waiting.popleft())
            tokens += len(rows[-1].input_ids)
        return rows

    def _inputs(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        batch = self._collate([row_inputs(row) for row in rows])
        return {name: value.to(self.model.device) for name, value in batch.items()}

    def _at_once(self, rows: list[Row]) -> Iterator[list[Found]]:
        out: Any = self.model(**self._inputs(rows))
        yield answers_of(rows, Answers(torch.arange(len(rows)), out.logits, out.exit_layer))

    def _streamed(self, rows: list[Row]) -> Iterator[list[Found]]:
        for part in self.model.stream(**self._inputs(rows)):
            yield answers_of(rows, part)


def taken_out(rows: deque[Row], unwanted: set[int]) -> list[int]:
    """Remove the rows with unwanted keys, and return their keys."""
    dropped = [row.key for row in rows if row.key in unwanted]
    kept = [row for row in rows if row.key not in unwanted]
    rows.clear()
    rows.extend(kept)
    return dropped


def row_inputs(row: Row) -> dict[str, list[int]]:
    """Return the inputs of a row by name."""
    inputs = {"input_ids": row.input_ids}
    return inputs if row.token_type_ids is None else {**inputs, "token_type_ids": row.token_type_ids}


def answers_of(rows: list[Row], part: Answers) -> list[Found]:
    """Return the answers of rows that left together, with their keys."""
    columns = zip(part.rows.tolist(), part.exit_layer.tolist(), part.logits.float().tolist(), strict=True)
    return [Found(rows[index].key, layer, logits) for index, layer, logits in columns]


def one_by_one(run: Callable[[list[Row]], Iterator[list[Found]]], rows: Iterable[Row]) -> Done:
    """Run each row alone, after a step of them has failed; the log has the errors."""
    done = Done([], [])
    for row in rows:
        try:
            done.answers.extend(next(run([row])))
        except torch.AcceleratorError:
            raise
        except Exception:
            logger.exception("the model failed on a row of %d tokens", len(row.input_ids))
            done.failed.append(row.key)
    return done
