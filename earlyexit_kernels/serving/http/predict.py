"""The route `/predict`: from the body of a request to its answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from earlyexit_kernels.serving.http.guard import read_body
from earlyexit_kernels.serving.http.lines import ClientGoneError, Lines
from earlyexit_kernels.serving.http.pool import FAILED, FULL, INVALID, Failure, Pool, QueueFullError, Ticket
from earlyexit_kernels.serving.http.protocol import Found
from earlyexit_kernels.serving.http.requests import (
    PredictRequest,
    RefusedError,
    Tokenizer,
    check_threshold,
    predictions,
)

NDJSON = "application/x-ndjson"
#: Seconds after which a client may try again where the server is overloaded or a worker was lost.
RETRY_AFTER = "1"


class Predict:
    """Answers requests of `/predict`.

    Args:
        pool: the workers.
        tokenizer: of the model; it runs in a thread, since a long text takes as long as many short requests.
    """

    def __init__(self, pool: Pool, tokenizer: Tokenizer) -> None:
        self._pool, self._tokenizer = pool, tokenizer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    async def __call__(self, request: Request) -> Response:
        """Return the answer to a request.

        Raises:
            RefusedError: the request is invalid, or the server overloaded.
            ClientGoneError: the client has closed the connection; its rows that had not begun are dropped.
        """
        settings = self._pool.settings
        asked = PredictRequest.parse(
            await read_body(
                request.receive,
                request.headers.get("content-length"),
                max_bytes=settings.max_body_bytes,
                seconds=settings.body_seconds,
            )
        )
        check_threshold(asked.threshold, settings)
        items = asked.texts(settings.max_inputs)
        with ExitStack() as stack:
            ticket = self._ticket(len(items))
            stack.callback(ticket.close)
            gone = asyncio.ensure_future(_disconnected(request))
            stack.callback(gone.cancel)
            gone.add_done_callback(lambda _: ticket.found.put_nowait(None))
            tokenise = partial(self._tokenizer.rows, items, truncate=asked.truncate)
            rows = await asyncio.get_running_loop().run_in_executor(self._thread, tokenise)
            ticket.submit(rows, asked.threshold)
            shown = partial(_shown, self._pool.info, asked.raw_scores)
            if NDJSON in request.headers.get("accept", ""):
                lines = _lines(ticket, len(items), shown)
                close = stack.pop_all().close
                return Lines(lines, close=close, media_type=NDJSON, seconds=settings.body_seconds)
            found = [shown(result) for result in await _all(ticket, len(items))]
        if all(isinstance(one, dict) for one in found):
            return JSONResponse(found[0], FAILED.status)
        return JSONResponse(found[0] if isinstance(asked.inputs, str) else found)

    def _ticket(self, rows: int) -> Ticket:
        try:
            return self._pool.reserve(rows)
        except QueueFullError:
            raise _refused(FULL) from None


async def _disconnected(request: Request) -> None:
    """Wait until the client has gone; called when the body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _next(ticket: Ticket) -> tuple[int, Found | Failure]:
    found = await ticket.found.get()
    if found is None:
        raise ClientGoneError
    return found


async def _all(ticket: Ticket, rows: int) -> list[Found | Failure]:
    """Return what was found for each row of a request, in its order.

    Raises:
        RefusedError: rows were too late or lost with their worker (503).
    """
    results: list[Any] = [None] * rows
    for _ in range(rows):
        index, found = await _next(ticket)
        if isinstance(found, Failure) and found.status != FAILED.status:
            raise _refused(found)
        results[index] = found
    return results


async def _lines(ticket: Ticket, rows: int, shown: Callable[[Found | Failure], Any]) -> AsyncIterator[bytes]:
    """Yield a line of JSON for each row, as soon as it is final."""
    for _ in range(rows):
        index, found = await _next(ticket)
        one = shown(found)
        rest = one if isinstance(one, dict) else {"predictions": one}
        yield json.dumps({"index": index, **rest}, allow_nan=False).encode() + b"\n"


def _shown(info: dict[str, Any], raw_scores: bool, found: Found | Failure) -> list[dict[str, Any]] | dict[str, str]:
    """Return the predictions of a row, or its error."""
    if isinstance(found, Found):
        scores = predictions(found, info["labels"], info["problem_type"], raw_scores=raw_scores)
        if scores is not None:
            return scores
        found = INVALID
    return {"error": found.text, "error_type": found.kind}


def _refused(failure: Failure) -> RefusedError:
    return RefusedError(failure.status, failure.kind, failure.text, Retry_After=RETRY_AFTER)
