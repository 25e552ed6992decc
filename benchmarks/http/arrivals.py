"""Texts that arrive at random: milliseconds from the arrival to the answer, through HTTP."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.harness import Record
from benchmarks.http.client import Client
from benchmarks.http.names import FULL, LITSERVE, OWN
from benchmarks.http.servers import serving
from earlyexit_kernels.tuning.timing import quantiles

#: Arrivals a second, over the texts a second that full depth answers where 64 requests are always under way.
LOADS = (0.4, 0.8, 1.2, 2.0)
SESSIONS = 3
SERVERS = (FULL, OWN, LITSERVE)
CLIENTS = 64
#: Seconds of a session.
SECONDS = 8.0


def records(model: Path, work: Path, texts: Sequence[str], seconds: float = SECONDS) -> Iterator[Record]:
    """Yield the latencies of all servers at all loads; the sessions of a load take turns with new arrivals."""
    with ExitStack() as stack:
        urls = {name: stack.enter_context(serving(name, model, work)).url for name in SERVERS}
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
                yield record(name, load, load * capacity, latencies, refused=asked[name] - len(latencies))


def record(server: str, load: float, rate: float, latencies: Sequence[float], *, refused: int) -> Record:
    """Return the record of a server at a load."""
    p50, p90, p99 = (round(time, 2) for time in quantiles(latencies, (0.5, 0.9, 0.99)))
    head = {"suite": "http", "part": "arrivals", "server": server, "load": load, "rate": round(rate, 1)}
    return head | {"answers": len(latencies), "refused": refused, "p50_ms": p50, "p90_ms": p90, "p99_ms": p99}


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
