"""Settings of the server."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from earlyexit_kernels.arguments import check_fields, number, optional, whole

#: Batches that a worker holds: the one that runs, and the next, which begins when that has ended.
HELD_BATCHES = 2


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a server serves, and its limits. Fields that `earlyexit serve` has no argument for are for tests.

    Attributes:
        model: folder of the model and its tokenizer.
        host, port: address; port 0 is any free one.
        workers: processes with a copy of the model each.
        max_length: tokens of a row, or None for all that the model takes.
        max_tokens: tokens of a batch; a longer row gets one of its own.
        max_wait_ms: milliseconds that a row may wait before a worker begins it.
        max_queue: rows that may wait.
        max_inputs: texts of a request.
        max_body_bytes: size of a request.
        min_threshold, max_threshold: between which a request may choose the threshold of its rows, or None for never.
        rate_limit: requests per second of a client, or None.
        api_key: that clients must send, or None.
        drain_seconds: time after SIGTERM in which requests under way are answered.
        body_seconds: time in which a request must have arrived, and in which a client must take a part of an answer.
        stalled_seconds: time without a sign of life after which a worker that has rows is replaced.
    """

    model: Path
    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    max_length: int | None = None
    max_tokens: int = 2048
    max_wait_ms: float = 5000.0
    max_queue: int = 4096
    max_inputs: int = 256
    max_body_bytes: int = 2**20
    min_threshold: float | None = None
    max_threshold: float | None = None
    rate_limit: float | None = None
    api_key: str | None = field(default=None, repr=False)
    drain_seconds: float = 30.0
    body_seconds: float = 30.0
    stalled_seconds: float = 120.0

    def __post_init__(self) -> None:
        positive = number(low=0, inside=True)
        count = whole(low=1)
        check_fields(
            self,
            {
                "port": whole(low=0, high=65535),
                "workers": count,
                "max_length": optional(count),
                "max_tokens": count,
                "max_wait_ms": positive,
                "max_queue": count,
                "max_inputs": count,
                "max_body_bytes": count,
                "min_threshold": optional(number()),
                "max_threshold": optional(number()),
                "rate_limit": optional(positive),
                "drain_seconds": positive,
                "body_seconds": positive,
                "stalled_seconds": positive,
            },
        )
        ends = (self.min_threshold, self.max_threshold)
        if (None in ends and ends != (None, None)) or (None not in ends and ends[0] > ends[1]):  # type: ignore[operator]
            got = " and ".join("none" if end is None else f"{end:g}" for end in ends)
            raise ValueError(f"--min-threshold, --max-threshold: expected both, the smaller one first, got {got}")
        if self.max_inputs > self.max_queue:
            raise ValueError(
                f"--max-inputs: expected at most --max-queue = {self.max_queue}, got {self.max_inputs}; a "
                "request with more texts than may wait could never be answered"
            )

    def public(self) -> dict[str, Any]:
        """Return the limits that clients may know."""
        names = """workers max_tokens max_wait_ms max_queue max_inputs max_body_bytes rate_limit min_threshold
            max_threshold""".split()
        return {name: asdict(self)[name] for name in names}
