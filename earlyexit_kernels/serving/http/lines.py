"""An answer that is sent line by line."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi.responses import Response


class ClientGoneError(Exception):
    """The client has closed the connection before its answer."""


class Lines(Response):
    """A response of lines that are sent as they are made; it is cut off where the client has gone or is too slow.

    Args:
        lines: the lines.
        close: called at the end.
        media_type: of the response.
        seconds: time in which the client must take a line.
    """

    def __init__(
        self, lines: AsyncIterator[bytes], *, close: Callable[[], None], media_type: str, seconds: float
    ) -> None:
        super().__init__(media_type=media_type)
        del self.headers["content-length"]
        self._lines, self._close, self._seconds = lines, close, seconds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for line in self._lines:
                message = {"type": "http.response.body", "body": line, "more_body": True}
                await asyncio.wait_for(send(message), self._seconds)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except (ClientGoneError, asyncio.TimeoutError, OSError):
            return  # uvicorn closes a connection whose answer is incomplete
        finally:
            self._close()
