"""The queue of the server, and the workers that take rows from it."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias

from earlyexit_kernels.serving.http.protocol import Found, Row
from earlyexit_kernels.serving.http.settings import HELD_BATCHES, Settings
from earlyexit_kernels.serving.http.worker_process import WorkerProcess

logger = logging.getLogger("earlyexit_kernels")

#: Seconds between looks at workers that may have stalled, and at rows that wait too long.
LOOK_SECONDS = 0.25
#: Seconds before a worker that failed to start is tried again, doubled each time, up to the last one.
RETRY_SECONDS = (1.0, 30.0)

#: Token ids of a row, and segment ids or None.
Tokens: TypeAlias = "tuple[list[int], list[int] | None]"


class Failure(NamedTuple):
    """Why a row has no answer: the HTTP status of a request for it alone, its kind, and text for the client."""

    status: int
    kind: str
    text: str


FAILED = Failure(424, "Backend", "the model failed on this input")
INVALID = Failure(424, "Backend", "the model's answer to this input is not a finite number")
LOST = Failure(503, "Unhealthy", "the worker that had this input has ended; send it again")
LATE = Failure(503, "Overloaded", "the server is overloaded: the input waited too long; send it again later")
FULL = Failure(503, "Overloaded", "the server is overloaded: its queue is full; send it again later")


class QueueFullError(Exception):
    """More rows would wait than the settings allow."""


class Ticket:
    """The rows of a request, in its order, and what has become of them.

    Attributes:
        found: index of a row and its answer or failure, as they arrive, each row once; None where the client has gone.
    """

    def __init__(self, pool: Pool, rows: int) -> None:
        self.found: asyncio.Queue[tuple[int, Found | Failure] | None] = asyncio.Queue()
        self.index: dict[int, int] = {}
        self.reserved = rows
        self.threshold: float | None = None
        self._pool = pool

    def submit(self, rows: Iterable[Tokens], threshold: float | None = None) -> None:
        """Queue the rows, with a threshold instead of that of the model."""
        self.threshold = threshold
        self._pool.submit(self, rows)

    def close(self) -> None:
        """Drop the rows that have no answer, where they have not begun."""
        self._pool.close(self)


class Step(NamedTuple):
    """What is added to the counts by a message of a worker, by its end, or by a row that waited too long.

    Attributes:
        layers: at which rows left.
        usual: those of rows without a threshold of their own.
        tokens: of these rows.
        failed: number of rows without an answer.
    """

    layers: list[int]
    usual: list[int]
    tokens: int
    failed: int


class Pool:
    """A queue of rows, and workers that are replaced when they end.

    Every method runs in the event loop.

    Args:
        settings: of the server.
        rows_done: called with what is added to the counts.

    Attributes:
        settings: as given.
        info: what the workers say of the model, once one is ready.
        restarts: number of workers that were replaced.
    """

    def __init__(self, settings: Settings, rows_done: Callable[[Step], None]) -> None:
        self.settings = settings
        self.info: dict[str, Any] = {}
        self.restarts = 0
        self._reserved = 0
        self._rows_done = rows_done
        self._queue: OrderedDict[int, tuple[float, Row]] = OrderedDict()
        self._tickets: dict[int, Ticket] = {}
        self._next_key = 0
        self._dispatching = False
        self._workers: list[WorkerProcess] = []
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def ready(self) -> int:
        """Number of workers that take rows."""
        return sum(worker.ready for worker in self._workers)

    @property
    def waiting(self) -> int:
        """Number of rows that no worker has, those included that are being tokenised."""
        return len(self._queue) + self._reserved

    async def start(self) -> None:
        """Start the workers and wait until all are ready.

        Raises:
            ValueError: the model cannot be loaded.
        """
        self._workers = [WorkerProcess(self.settings) for _ in range(self.settings.workers)]
        try:
            await asyncio.gather(*(worker.start() for worker in self._workers))
        except BaseException:
            await self.stop()
            raise
        self.info = self._workers[0].info
        self._tasks = [asyncio.create_task(self._keep(worker)) for worker in self._workers]
        self._tasks.append(asyncio.create_task(self._look()))

    async def stop(self) -> None:
        """End the workers; rows without an answer are lost."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(worker.stop() for worker in self._workers))
        self._fail(list(self._tickets), LOST)

    def reserve(self, rows: int) -> Ticket:
        """Return a ticket for this many rows.

        Raises:
            QueueFullError: they have no room in the queue.
        """
        if self.waiting + rows > self.settings.max_queue:
            raise QueueFullError
        self._reserved += rows
        return Ticket(self, rows)

    def submit(self, ticket: Ticket, rows: Iterable[Tokens]) -> None:
        """Queue the rows of a ticket, as many as it was reserved for."""
        now = asyncio.get_running_loop().time()
        for index, (input_ids, token_type_ids) in enumerate(rows):
            key = self._next_key
            self._next_key += 1
            self._tickets[key] = ticket
            ticket.index[key] = index
            self._queue[key] = (now, Row(key, input_ids, token_type_ids, ticket.threshold))
        self._release(ticket)
        self._dispatch_soon()

    def close(self, ticket: Ticket) -> None:
        """Forget a ticket: rows in the queue are dropped, and workers are asked to drop those not begun."""
        self._release(ticket)
        keys = list(ticket.index)
        ticket.index.clear()
        for key in keys:
            del self._tickets[key]
            self._queue.pop(key, None)
        for worker in self._workers:
            held = [key for key in keys if key in worker.tokens]
            if held:
                worker.send({"drop": held})

    def _release(self, ticket: Ticket) -> None:
        self._reserved -= ticket.reserved
        ticket.reserved = 0

    def _dispatch_soon(self) -> None:
        """Dispatch once, after all that this turn of the loop has to queue."""
        if not self._dispatching:
            self._dispatching = True
            asyncio.get_running_loop().call_soon(self._dispatch)

    def _dispatch(self) -> None:
        """Give rows to the workers that hold the fewest tokens, up to `HELD_BATCHES` batches each."""
        self._dispatching = False
        room = HELD_BATCHES * self.settings.max_tokens
        batches: dict[WorkerProcess, list[Row]] = {}
        while self._queue:
            key, (_, row) = next(iter(self._queue.items()))
            worker = min((w for w in self._workers if w.ready), key=lambda w: w.held, default=None)
            if worker is None or (worker.held and worker.held + len(row.input_ids) > room):
                break
            del self._queue[key]
            worker.take(key, len(row.input_ids))
            batches.setdefault(worker, []).append(row)
        for worker, rows in batches.items():
            worker.send({"rows": rows})

    async def _keep(self, worker: WorkerProcess) -> None:
        """Read what a worker says, and replace it when it ends."""
        while True:
            async for message in worker.messages():
                self._read(worker, message)
            worker.kill()
            lost = list(worker.tokens)
            self._rows_done(Step([], [], 0, len(lost)))
            self._fail(lost, LOST)
            logger.error("a worker has ended with %d rows (%s); starting another", len(lost), await worker.ending())
            self.restarts += 1
            await self._start_again(worker)
            self._dispatch_soon()

    async def _start_again(self, worker: WorkerProcess) -> None:
        pause, longest = RETRY_SECONDS
        while True:
            try:
                await worker.start()
                if worker.info == self.info:
                    return
                await worker.stop()
                raise ValueError(f"the model in {self.settings.model} has changed; restart the server to serve it")
            except (OSError, ValueError) as error:
                logger.error("%s; trying again in %g s", error, pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest)

    def _read(self, worker: WorkerProcess, message: dict[str, Any]) -> None:
        answers = [Found(*answer) for answer in message["answers"]]
        tokens = sum(worker.give_back(answer.key) for answer in answers)
        for key in (*message["failed_rows"], *message["dropped"]):
            worker.give_back(key)
        owners = [self._tickets.get(answer.key) for answer in answers]
        usual = [a.exit_layer for a, owner in zip(answers, owners, strict=True) if owner and owner.threshold is None]
        self._rows_done(Step([a.exit_layer for a in answers], usual, tokens, len(message["failed_rows"])))
        for answer in answers:
            self._deliver(answer.key, answer)
        self._fail(message["failed_rows"], FAILED)
        self._dispatch_soon()

    def _deliver(self, key: int, found: Found | Failure) -> None:
        ticket = self._tickets.pop(key, None)
        if ticket is not None:  # else its client has gone
            ticket.found.put_nowait((ticket.index.pop(key), found))

    def _fail(self, keys: Iterable[int], failure: Failure) -> None:
        for key in keys:
            self._deliver(key, failure)

    async def _look(self) -> None:
        """Fail rows that wait too long, and kill workers that have stalled."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            since = loop.time() - self.settings.max_wait_ms / 1000
            while self._queue and next(iter(self._queue.values()))[0] < since:
                self._rows_done(Step([], [], 0, 1))
                self._deliver(self._queue.popitem(last=False)[0], LATE)
            for worker in self._workers:
                if worker.stalled(self.settings.stalled_seconds):
                    logger.error("a worker has not answered for %g s; ending it", self.settings.stalled_seconds)
                    worker.kill()
