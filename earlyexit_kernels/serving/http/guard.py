"""What a request must pass before its body is read: the API key and the rate limit; and how a body is read."""

from __future__ import annotations

import asyncio
import hmac
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any

from earlyexit_kernels.serving.http.lines import ClientGoneError
from earlyexit_kernels.serving.http.requests import RefusedError

#: Clients whose rate is remembered; where there are more, those that asked longest ago are forgotten.
CLIENTS = 10_000


class RateLimit:
    """A token bucket for each client: `rate` requests a second, and as many at once (at least one).

    Args:
        rate: requests per second.
        clock: seconds.
    """

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._clock = rate, max(1.0, rate), clock
        self._clients: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, client: str) -> float:
        """Count a request of a client; return 0 if it may pass, else the seconds until one may."""
        now = self._clock()
        left, then = self._clients.pop(client, (self._burst, now))
        left = min(self._burst, left + (now - then) * self._rate)
        passes = left >= 1
        self._clients[client] = (left - passes, now)
        if len(self._clients) > CLIENTS:
            self._clients.popitem(last=False)
        return 0.0 if passes else (1 - left) / self._rate


def check_key(expected: str | None, authorization: str | None) -> None:
    """Compare the key of a request, ``Authorization: Bearer KEY``, in constant time.

    Args:
        expected: the key, or None where all may pass.
        authorization: the header, or None.

    Raises:
        RefusedError: the key is missing or wrong (401).
    """
    if expected is None:
        return
    scheme, _, given = (authorization or "").partition(" ")
    same = hmac.compare_digest(given.strip().encode("latin-1"), expected.encode())
    if scheme.lower() != "bearer" or not same:
        text = "expected the header Authorization: Bearer KEY with the API key"
        raise RefusedError(401, "Unauthorized", text, WWW_Authenticate="Bearer")


def check_rate(limit: RateLimit | None, client: str) -> None:
    """Count a request of a client.

    Raises:
        RefusedError: it exceeds the rate (429).
    """
    seconds = 0 if limit is None else math.ceil(limit.wait(client))
    if seconds:
        text = f"too many requests; send the next in {seconds} s"
        raise RefusedError(429, "Overloaded", text, Retry_After=str(seconds))


async def read_body(
    receive: Callable[[], Awaitable[Any]], declared: str | None, *, max_bytes: int, seconds: float
) -> bytes:
    """Read the body of a request.

    Args:
        receive: of ASGI.
        declared: the header Content-Length, or None.
        max_bytes: limit.
        seconds: time in which it must have arrived.

    Raises:
        RefusedError: it is too long (413), or too slow (408).
        ClientGoneError: the connection was closed.
    """
    too_long = RefusedError(413, "Validation", f"expected a body of at most {max_bytes} bytes", Connection="close")
    if declared is not None and declared.isdigit() and int(declared) > max_bytes:
        raise too_long

    async def read() -> bytes:
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > max_bytes:
                raise too_long
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), seconds)
    except asyncio.TimeoutError:
        text = f"expected the whole body within {seconds:g} s"
        raise RefusedError(408, "Validation", text, Connection="close") from None
