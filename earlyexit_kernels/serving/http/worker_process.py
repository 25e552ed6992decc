"""A worker process, as the event loop of the server sees it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

from earlyexit_kernels.serving.http.protocol import MAX_LINE, Order, line
from earlyexit_kernels.serving.http.settings import Settings

#: Arguments of Python that start a worker.
WORKER = ("-m", "earlyexit_kernels.serving.http.worker")
#: Seconds in which a worker ends by itself after its input has ended.
END_SECONDS = 5.0


class WorkerProcess:
    """Starts a worker, sends it rows, reads its messages, and knows which rows it holds.

    Args:
        settings: of the server.

    Attributes:
        ready: whether it takes rows.
        info: what it says of the model.
        tokens: key -> number of tokens of the rows that it holds.
        held: sum of `tokens`.
    """

    def __init__(self, settings: Settings) -> None:
        self.ready = False
        self.info: dict[str, Any] = {}
        self.tokens: dict[int, int] = {}
        self.held = 0
        threads = max(1, len(os.sched_getaffinity(0)) // settings.workers)
        self._order = Order(str(settings.model), settings.max_tokens, threads)
        self._process: asyncio.subprocess.Process | None = None
        self._heard = 0.0

    @property
    def process(self) -> asyncio.subprocess.Process:
        """The process that was started last."""
        assert self._process is not None, "start() comes first"
        return self._process

    async def start(self) -> None:
        """Start a process and wait until it is ready.

        Raises:
            ValueError: it cannot load the model.
        """
        self.tokens, self.held = {}, 0
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            *WORKER,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=MAX_LINE,
            start_new_session=True,  # Ctrl-C in a terminal is for the server, which drains
        )
        self.send(self._order._asdict())
        first = await self._next()
        if first is None or "failed" in first:
            await self.stop()
            reason = await self.ending() if first is None else first["failed"]
            raise ValueError(f"a worker cannot serve {self._order.model}: {reason}")
        self.info = first["ready"]
        self.ready = True

    async def messages(self) -> AsyncIterator[dict[str, Any]]:
        """Yield messages until the process ends."""
        while (message := await self._next()) is not None:
            self._heard = asyncio.get_running_loop().time()
            yield message
        self.ready = False

    async def _next(self) -> dict[str, Any] | None:
        assert self.process.stdout is not None
        text = await self.process.stdout.readline()
        return json.loads(text) if text.endswith(b"\n") else None

    def send(self, message: dict[str, Any]) -> None:
        """Send a message; nothing happens where the process has ended, which `messages` notices."""
        assert self.process.stdin is not None
        if not self.process.stdin.is_closing():
            self.process.stdin.write(line(message))

    def take(self, key: int, tokens: int) -> None:
        """Note that the worker holds a row."""
        if not self.tokens:
            self._heard = asyncio.get_running_loop().time()
        self.tokens[key] = tokens
        self.held += tokens

    def give_back(self, key: int) -> int:
        """Note that the worker no longer holds a row, and return its number of tokens."""
        tokens = self.tokens.pop(key)
        self.held -= tokens
        return tokens

    def stalled(self, seconds: float) -> bool:
        """Return whether it holds rows and has said nothing for this long."""
        return self.ready and bool(self.tokens) and asyncio.get_running_loop().time() - self._heard > seconds

    def kill(self) -> None:
        """End the process at once."""
        if self.process.returncode is None:
            self.process.kill()

    async def stop(self) -> None:
        """End the process: by the end of its input, or at once where that does not help."""
        self.ready = False
        if self._process is None:
            return
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            await asyncio.wait_for(self.process.wait(), END_SECONDS)
        except asyncio.TimeoutError:
            self.kill()
            await self.process.wait()

    async def ending(self) -> str:
        """Wait for the process to end, and say how it did."""
        code = await self.process.wait()
        return f"signal {-code}" if code < 0 else f"exit code {code}"
