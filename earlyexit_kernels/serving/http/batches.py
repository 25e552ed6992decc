"""The batches of a worker: rows that wait share one, and are answered as they leave it.

A batch in which the model raises is run again row by row, so that a row on which it fails leaves its neighbours alone.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from earlyexit_kernels.hf.model import EarlyExitForSequenceClassification
from earlyexit_kernels.hf.predict import PadRight
from earlyexit_kernels.serving.http.protocol import Found, Row

logger = logging.getLogger("earlyexit_kernels")


class Done(NamedTuple):
    """What a step has finished: answers, and the keys of rows on which the model failed."""

    answers: list[Found]
    failed: list[int]


class Batches:
    """Rows in batches of one threshold; the oldest row that waits is in the next batch.

    Args:
        model: in eval mode. Its criterion is changed for rows with a threshold of their own.
        max_tokens: of a batch, without padding; a longer row gets a batch of its own.
    """

    def __init__(self, model: EarlyExitForSequenceClassification, max_tokens: int) -> None:
        self._model, self._max_tokens, self._usual = model, max_tokens, model.criterion
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
        unwanted = set(keys)
        dropped = [row.key for row in self._waiting if row.key in unwanted]
        self._waiting = deque(row for row in self._waiting if row.key not in unwanted)
        return dropped

    def step(self) -> Done:
        """Run until rows of the batch leave, of which there are some."""
        try:
            if not self._batch:
                self._batch = {row.key: row for row in self._next_rows()}
                self._parts = self._run(list(self._batch.values()))
            answers = next(self._parts)
        except torch.AcceleratorError:
            raise  # after an error of the device nothing runs in this process
        except Exception:
            rows, self._batch = list(self._batch.values()), {}
            return self._one_by_one(rows)
        for answer in answers:
            del self._batch[answer.key]
        return Done(answers, [])

    def _next_rows(self) -> list[Row]:
        """Take the first row and those of its threshold that fit a batch with it."""
        first = self._waiting.popleft()
        rows, later, tokens = [first], [], len(first.input_ids)
        while self._waiting and tokens < self._max_tokens:
            row = self._waiting.popleft()
            if row.threshold != first.threshold:
                later.append(row)
                continue
            tokens += len(row.input_ids)
            if tokens > self._max_tokens:
                later.append(row)
                break
            rows.append(row)
        self._waiting.extendleft(reversed(later))
        return rows

    def _run(self, rows: list[Row]) -> Iterator[list[Found]]:
        """Yield the answers of rows of one threshold as they leave."""
        self._set_threshold(rows[0].threshold)
        batch = self._collate([row_inputs(row) for row in rows])
        for part in self._model.stream(**{name: value.to(self._model.device) for name, value in batch.items()}):
            columns = zip(part.rows.tolist(), part.exit_layer.tolist(), part.logits.float().tolist(), strict=True)
            yield [Found(rows[index].key, layer, logits) for index, layer, logits in columns]

    def _set_threshold(self, threshold: float | None) -> None:
        rule: Any = self._usual
        rule = rule if threshold is None else replace(rule, threshold=threshold)
        if rule != self._model.criterion:
            self._model.set_criterion(rule)

    def _one_by_one(self, rows: Iterable[Row]) -> Done:
        """Run each row alone, after their batch has failed; the log has the errors."""
        done = Done([], [])
        for row in rows:
            try:
                done.answers.extend(next(self._run([row])))
            except torch.AcceleratorError:
                raise
            except Exception:
                logger.exception("the model failed on a row of %d tokens", len(row.input_ids))
                done.failed.append(row.key)
        return done


def row_inputs(row: Row) -> dict[str, list[int]]:
    """Return the inputs of a row by name."""
    inputs = {"input_ids": row.input_ids}
    return inputs if row.token_type_ids is None else {**inputs, "token_type_ids": row.token_type_ids}
