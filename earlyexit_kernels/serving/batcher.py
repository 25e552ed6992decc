"""A thread that runs the model for a server: rows that wait share a batch, and are answered as they leave it."""

from __future__ import annotations

import asyncio
import logging
import math
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from earlyexit_kernels.hf.model import EarlyExitForSequenceClassification
from earlyexit_kernels.hf.predict import PadRight
from earlyexit_kernels.serving.answers import DEFAULT_FUNCTION, FUNCTIONS
from earlyexit_kernels.types import Answers

logger = logging.getLogger("earlyexit_kernels")

#: Seconds without an answer after which a batch under way has stalled.
STALL_SECONDS = 120.0


class QueueFullError(Exception):
    """More rows would wait than the queue takes."""


class Answer(NamedTuple):
    """The answer to a row: 1-based layer of its exit, logits and scores of the C classes, which may not be finite."""

    exit_layer: int
    logits: list[float]
    scores: list[float]


class NoAnswer(NamedTuple):
    """Why a row has no answer: the HTTP status of a request for it alone, and kind and text for its client."""

    status: int
    kind: str
    text: str


FAILED = NoAnswer(424, "Backend", "the model failed on this input")
INVALID = NoAnswer(424, "Backend", "the model's answer to this input is not a finite number")
LATE = NoAnswer(503, "Overloaded", "the server is overloaded: the input waited too long; send it again later")


@dataclass(frozen=True, eq=False)
class Row:
    """A row that waits: its inputs by name, the future that gets its answer, and the time at which it came."""

    inputs: Mapping[str, list[int]]
    future: asyncio.Future[Answer | NoAnswer]
    came: float = field(default_factory=time.monotonic)

    @property
    def tokens(self) -> int:
        return len(self.inputs["input_ids"])


class Batcher:
    """Runs a model in a thread of its own, in batches of the rows that have waited longest.

    A row whose future is cancelled before its batch begins does not run. A batch in which the model raises is run
    again row by row, so that a row on which it fails leaves its neighbours alone. The process ends, and is to be
    started again by whoever supervises it, after an error of the device, and where a batch has stalled.

    Args:
        load: returns the model in eval mode and its tokenizer; called in the thread, to which settings of torch belong.
        max_tokens: of a batch, without padding; a longer row is a batch of its own.
        max_rows: that may wait.
        max_wait: seconds after which a row that has not begun gets `LATE`.
        threads: of torch, unless OMP_NUM_THREADS is set.
        stall_seconds: after which a batch has stalled.

    Attributes:
        model, tokenizer: as loaded.
        count: called in the thread with the rows that left together and their answers, None where they have none.
        queued: called with the number of rows that wait, where it has changed.

    Raises:
        Exception: as `load` and the first row raise.
    """

    def __init__(
        self,
        load: Callable[[], tuple[EarlyExitForSequenceClassification, Any]],
        *,
        max_tokens: int,
        max_rows: int,
        max_wait: float = math.inf,
        threads: int = 1,
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        self._max_tokens, self._max_rows, self._max_wait = max_tokens, max_rows, max_wait
        self._threads, self._stall_seconds = threads, stall_seconds
        self.count: Callable[[Sequence[Row], Answers | None], None] = lambda rows, part: None
        self.queued: Callable[[int], None] = lambda rows: None
        self._waiting: deque[Row] = deque()
        self._wake = threading.Condition()
        self._heard: float | None = None
        ready: Future[tuple[EarlyExitForSequenceClassification, Any]] = Future()
        threading.Thread(target=self._main, args=(load, ready), name="model", daemon=True).start()
        self.model, self.tokenizer = ready.result()
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    @property
    def waiting(self) -> int:
        """Number of rows that have not begun."""
        return len(self._waiting)

    def check(self, rows: int) -> None:
        """Check that there is room for further rows.

        Raises:
            QueueFullError: there is none.
        """
        if len(self._waiting) + rows > self._max_rows:
            raise QueueFullError

    def submit(self, rows: Sequence[Mapping[str, list[int]]]) -> list[asyncio.Future[Answer | NoAnswer]]:
        """Queue rows, and return a future for each; called in an event loop.

        Raises:
            QueueFullError: there is no room for them.
        """
        loop = asyncio.get_running_loop()
        added = [Row(row, loop.create_future()) for row in rows]
        with self._wake:
            self.check(len(rows))
            self._waiting.extend(added)
            self._wake.notify()
            self.queued(len(self._waiting))
        return [row.future for row in added]

    @torch.inference_mode()
    def _main(self, load: Callable[[], Any], ready: Future[Any]) -> None:
        try:
            if "OMP_NUM_THREADS" not in os.environ:
                torch.set_num_threads(self._threads)
            torch.set_flush_denormal(True)
            model, tokenizer = load()
            pad, score = PadRight.of(model), FUNCTIONS[DEFAULT_FUNCTION[model.problem_type]]
            batch = pad([{"input_ids": [0]}])
            list(model.stream(**_on(model.device, batch)))  # packs the weights before the first request
        except Exception as error:
            ready.set_exception(error)
            return
        self._pad, self._score = pad, score
        ready.set_result((model, tokenizer))
        try:
            while True:
                rows = self._take()
                self._heard = time.monotonic()
                self._answer(rows)
                self._heard = None
        except BaseException:  # among others an error of the device, after which nothing runs in this process
            logger.critical("the thread of the model has failed; the process ends", exc_info=True)
            os._exit(1)

    def _take(self) -> list[Row]:
        """Wait for rows, and return the oldest ones that fit a batch."""
        batch: list[Row] = []
        late: list[Row] = []
        with self._wake:
            self._wake.wait_for(lambda: self._waiting)
            begun, tokens = time.monotonic(), 0
            while self._waiting and (not batch or tokens + self._waiting[0].tokens <= self._max_tokens):
                row = self._waiting.popleft()
                if row.future.cancelled():
                    continue
                if begun - row.came > self._max_wait:
                    late.append(row)
                    continue
                batch.append(row)
                tokens += row.tokens
            self.queued(len(self._waiting))
        self._deliver(late, [LATE] * len(late))
        return batch

    def _answer(self, rows: Sequence[Row]) -> None:
        """Run rows as a batch, and deliver the answers of those that leave together."""
        left = dict(enumerate(rows))
        try:
            if rows:
                batch = self._pad([row.inputs for row in rows])
                for part in self.model.stream(**_on(self.model.device, batch)):
                    answered = [left.pop(index) for index in part.rows.tolist()]
                    logits = part.logits.double()
                    columns = (part.exit_layer.tolist(), logits.tolist(), self._score(logits).tolist())
                    self._deliver(answered, [Answer(*values) for values in zip(*columns, strict=True)], part)
                    self._heard = time.monotonic()
        except torch.AcceleratorError:
            raise
        except Exception:
            if len(rows) == 1:
                logger.exception("the model failed on a row of %d tokens", rows[0].tokens)
                self._deliver(rows, [FAILED])
            else:
                for row in left.values():
                    self._answer([row])

    def _deliver(self, rows: Sequence[Row], answers: Sequence[Answer | NoAnswer], part: Answers | None = None) -> None:
        if rows:
            self.count(rows, part)
            loop = rows[0].future.get_loop()
            if not loop.is_closed():  # else the server has ended, and nobody waits
                loop.call_soon_threadsafe(_set, rows, answers)

    def _watch(self) -> None:
        """End the process where a batch has stalled; drain it where its supervisor has gone."""
        supervisor = multiprocessing.parent_process()
        while True:
            time.sleep(min(1.0, self._stall_seconds / 4))
            heard = self._heard
            if heard is not None and time.monotonic() - heard > self._stall_seconds:
                logger.critical("the model has not answered for %g s; the process ends", self._stall_seconds)
                os._exit(1)
            if supervisor is not None and not supervisor.is_alive():
                os.kill(os.getpid(), signal.SIGTERM)
                return


def _on(device: torch.device, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.to(device) for name, value in batch.items()}


def _set(rows: Sequence[Row], answers: Sequence[Answer | NoAnswer]) -> None:
    for row, answer in zip(rows, answers, strict=True):
        if not row.future.done():  # else its client has gone
            row.future.set_result(answer)
