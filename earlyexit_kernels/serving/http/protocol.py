"""Messages between the server and its workers: one JSON object a line, over the worker's standard input and output.

A worker reads an `Order` first and answers ``{"ready": ...}`` or ``{"failed": ...}``. Then it reads rows and drops, and
writes answers, errors and what was dropped. It ends when its input does. A row is named by its key, a number that the
server gives once.
"""

from __future__ import annotations

import json
import os
import select
from typing import Any, NamedTuple

#: Bytes of a read; also the limit of a line, which is far longer than a batch of the largest `max_tokens` needs.
CHUNK = 2**16
MAX_LINE = 2**28


class Row(NamedTuple):
    """A tokenised row: its key, token ids, segment ids or None, and its own threshold or None."""

    key: int
    input_ids: list[int]
    token_type_ids: list[int] | None = None
    threshold: float | None = None


class Found(NamedTuple):
    """The answer of a row: its key, the 1-based layer of the exit, and the logits of the C classes."""

    key: int
    exit_layer: int
    logits: list[float]


class Order(NamedTuple):
    """What a worker shall run: folder of the model, tokens of a batch and CPU threads."""

    model: str
    max_tokens: int
    threads: int


def line(message: dict[str, Any]) -> bytes:
    """Return a message as a line. Float32 numbers keep every bit; NaN and infinity are written as Python does."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


class Channel:
    """The worker's end: blocking reads and writes of whole messages.

    Args:
        source, target: file descriptors.

    Attributes:
        closed: whether the other end is closed.
    """

    def __init__(self, source: int, target: int) -> None:
        self.closed = False
        self._source, self._target = source, target
        self._rest = b""

    def receive(self, *, wait: bool) -> list[dict[str, Any]]:
        """Return the messages that have arrived.

        Args:
            wait: until there are any, or the other end is closed.
        """
        parts: list[bytes] = []
        while not self.closed and select.select([self._source], [], [], None if wait else 0)[0]:
            part = os.read(self._source, CHUNK)
            self.closed = not part
            parts.append(part)
            wait = wait and b"\n" not in part
        *lines, self._rest = (self._rest + b"".join(parts)).split(b"\n") if parts else (self._rest,)
        return [json.loads(text) for text in lines]

    def send(self, message: dict[str, Any]) -> None:
        """Write a message; nothing is written where the server has gone."""
        rest = memoryview(line(message))
        try:
            while rest:
                rest = rest[os.write(self._target, rest) :]
        except BrokenPipeError:
            self.closed = True
