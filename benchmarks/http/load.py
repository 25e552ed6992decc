"""`earlyexit serve` through HTTP: ``python -m benchmarks.run --suite http --model out``.

Needs the extra `serve`, httpx, litserve and a trained model with a criterion. Clients and servers share the cores of
this machine. *Overhead*: one client, one text at a time, less the time of the model in this process. *Arrivals*: texts
that arrive at random, from the arrival to the answer.
"""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import httpx

import earlyexit_kernels as ee
from benchmarks.glue import read_split
from benchmarks.harness import Record
from benchmarks.http.servers import FULL, LITSERVE, OWN, serving
from benchmarks.machine import NotMeasuredError, trained_folder
from earlyexit_kernels.tuning.timing import interleave, quantiles

SUITE, ALONE = "http", "Scorer, no server"
#: Requests of one client for each repeat, and seconds of rest in which threads of the process before stop spinning.
REQUESTS_PER_REPEAT, REST = 50, 0.02

#: Arrivals a second, over the texts a second that full depth answers where 64 requests are always under way.
LOADS = (0.4, 0.8, 1.2, 2.0)
SESSIONS = 3
SERVERS = (FULL, OWN, LITSERVE)
CLIENTS = 64
#: Seconds of a session for each repeat.
SECONDS_PER_REPEAT = 0.8


def records(repeats: int) -> Iterator[Record]:
    """Yield the records of both parts."""
    model = trained_folder()
    if ee.EarlyExitForSequenceClassification.from_pretrained(model).criterion is None:
        raise NotMeasuredError(f"the model has no criterion; run earlyexit calibrate {model} --max-drop 0.005")
    texts = list(read_split("sst2", "dev").texts)
    with tempfile.TemporaryDirectory() as work:
        yield from overhead(model, Path(work), texts, repeats * REQUESTS_PER_REPEAT)
        yield from arrivals(model, Path(work), texts, repeats * SECONDS_PER_REPEAT)


def overhead(model: Path, work: Path, texts: Sequence[str], requests: int) -> Iterator[Record]:
    """Yield the milliseconds of the scorer alone and of the servers, which take turns with each text."""
    with ExitStack() as stack:
        scorer, turn = ee.Scorer(model, drift_window=None), 0

        def next_text(_: str) -> None:
            nonlocal turn
            turn += 1
            time.sleep(REST)

        def text() -> str:
            return texts[(turn - 1) // len(calls) % len(texts)]

        calls: dict[str, Any] = {ALONE: lambda: scorer([text()])}
        for name in (OWN, LITSERVE):
            client = stack.enter_context(httpx.Client(base_url=stack.enter_context(serving(name, model, work))))
            calls[name] = partial(_post, client, text)
        times = interleave(calls, repeats=requests, warmup=0, prepare=next_text)
    alone = quantiles(times[ALONE], (0.5,))[0]
    for name, found in times.items():
        p50, p99 = quantiles(found, (0.5, 0.99))
        numbers = {"p50_ms": round(p50, 3), "p99_ms": round(p99, 3), "overhead_ms": round(p50 - alone, 3)}
        yield {"suite": SUITE, "part": "overhead", "server": name, "requests": requests, **numbers}


def _post(client: httpx.Client, text: Any) -> None:
    client.post("/predict", json={"inputs": text()}).raise_for_status()


def arrivals(model: Path, work: Path, texts: Sequence[str], seconds: float) -> Iterator[Record]:
    """Yield the latencies of all servers at all loads; the sessions of a load take turns with new arrivals."""
    with ExitStack() as stack:
        urls = {name: stack.enter_context(serving(name, model, work)) for name in SERVERS}
        for url in urls.values():
            asyncio.run(throughput(url, texts, seconds / 4))  # warm
        capacity = asyncio.run(throughput(urls[FULL], texts, seconds))
        for load in LOADS:
            found: dict[str, list[float]] = {name: [] for name in SERVERS}
            asked: dict[str, int] = dict.fromkeys(SERVERS, 0)
            for seed in range(SESSIONS):
                for name in random.Random(seed).sample(SERVERS, len(SERVERS)):
                    latencies, sent = asyncio.run(session(urls[name], texts, load * capacity, seed, seconds))
                    found[name] += latencies
                    asked[name] += sent
            for name, latencies in found.items():
                yield record(name, load, load * capacity, latencies, turned_away=asked[name] - len(latencies))


def record(server: str, load: float, rate: float, latencies: Sequence[float], *, turned_away: int) -> Record:
    """Return the record of a server at a load."""
    p50, p90, p99 = (round(time, 2) for time in quantiles(latencies, (0.5, 0.9, 0.99)))
    head = {"suite": SUITE, "part": "arrivals", "server": server, "load": load, "rate": round(rate, 1)}
    return head | {"answers": len(latencies), "turned_away": turned_away, "p50_ms": p50, "p90_ms": p90, "p99_ms": p99}


class Client:
    """As many connections as requests are under way at most.

    Args:
        url: of a server.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None and parts.port is not None
        self._address = parts.hostname, parts.port
        self._idle: deque[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = deque()

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for _reader, writer in self._idle:
            writer.close()

    async def ask(self, text: str) -> bool:
        """Ask for the answer to a text; return whether the server gave one, and did not refuse it as overloaded.

        Raises:
            RuntimeError: it has another status.
        """
        body = json.dumps({"inputs": text}).encode()
        head = "POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        while True:
            kept = bool(self._idle)
            reader, writer = self._idle.pop() if kept else await asyncio.open_connection(*self._address)
            try:
                writer.write(head.encode() + body)
                answer = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
                break
            except (ConnectionError, asyncio.IncompleteReadError):
                writer.close()
                if not kept:  # a server may close a connection that was idle, before it reads from it
                    raise
        length = int(answer.partition("content-length:")[2].partition("\r\n")[0])
        content = await reader.readexactly(length)
        self._idle.append((reader, writer))
        status = answer.split()[1]
        if status not in ("200", "503"):
            raise RuntimeError(f"expected status 200 or 503, got {status}: {content[:200]!r}")
        return status == "200"


async def throughput(url: str, texts: Sequence[str], seconds: float) -> float:
    """Return answers a second where `CLIENTS` requests are always under way."""
    answered = 0
    end = time.perf_counter() + seconds

    async def one(client: Client, number: int) -> None:
        nonlocal answered
        while time.perf_counter() < end:
            await client.ask(texts[(number + answered) % len(texts)])
            answered += 1

    async with Client(url) as client:
        start = time.perf_counter()
        await asyncio.gather(*(one(client, number) for number in range(CLIENTS)))
        return answered / (time.perf_counter() - start)


async def session(url: str, texts: Sequence[str], rate: float, seed: int, seconds: float) -> tuple[list[float], int]:
    """Return the milliseconds of the answers to a Poisson process of `rate` a second, and the number of its texts."""
    draw = random.Random(seed).expovariate
    latencies: list[float] = []

    async def one(client: Client, text: str, arrived: float) -> None:
        if await client.ask(text):
            latencies.append(1000 * (time.perf_counter() - arrived))

    async with Client(url) as client:
        arrived, asked = time.perf_counter(), []
        end = arrived + seconds
        while (arrived := arrived + draw(rate)) < end:
            await asyncio.sleep(max(0.0, arrived - time.perf_counter()))
            asked.append(asyncio.create_task(one(client, texts[len(asked) % len(texts)], arrived)))
        await asyncio.gather(*asked)
    return latencies, len(asked)
