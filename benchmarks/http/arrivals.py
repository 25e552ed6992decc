"""Texts that arrive at random: milliseconds from the arrival to the answer, through HTTP."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import httpx

from benchmarks.harness import Record
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
            for seed in range(SESSIONS):
                for name in random.Random(seed).sample(SERVERS, len(SERVERS)):
                    found[name] += asyncio.run(session(urls[name], texts, load * capacity, seed, seconds))
            for name, latencies in found.items():
                yield record(name, load, load * capacity, latencies)


def record(server: str, load: float, rate: float, latencies: Sequence[float]) -> Record:
    """Return the record of a server at a load."""
    p50, p90, p99 = (round(time, 2) for time in quantiles(latencies, (0.5, 0.9, 0.99)))
    head = {"suite": "http", "part": "arrivals", "server": server, "load": load, "rate": round(rate, 1)}
    return head | {"answers": len(latencies), "p50_ms": p50, "p90_ms": p90, "p99_ms": p99}


async def throughput(url: str, texts: Sequence[str], seconds: float) -> float:
    """Return answers a second where `CLIENTS` requests are always under way."""
    answered = 0
    end = time.perf_counter() + seconds

    async def one(client: httpx.AsyncClient, number: int) -> None:
        nonlocal answered
        while time.perf_counter() < end:
            await _ask(client, texts[(number + answered) % len(texts)])
            answered += 1

    async with _client(url) as client:
        start = time.perf_counter()
        await asyncio.gather(*(one(client, number) for number in range(CLIENTS)))
        return answered / (time.perf_counter() - start)


async def session(url: str, texts: Sequence[str], rate: float, seed: int, seconds: float) -> list[float]:
    """Return the milliseconds of every text of a Poisson process of `rate` a second, from its arrival."""
    draw = random.Random(seed).expovariate
    latencies: list[float] = []

    async def one(client: httpx.AsyncClient, text: str, arrived: float) -> None:
        await _ask(client, text)
        latencies.append(1000 * (time.perf_counter() - arrived))

    async with _client(url) as client:
        arrived, asked = time.perf_counter(), []
        end = arrived + seconds
        while (arrived := arrived + draw(rate)) < end:
            await asyncio.sleep(max(0.0, arrived - time.perf_counter()))
            asked.append(asyncio.create_task(one(client, texts[len(asked) % len(texts)], arrived)))
        await asyncio.gather(*asked)
    return latencies


def _client(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(base_url=url, timeout=120, limits=limits)


async def _ask(client: httpx.AsyncClient, text: str) -> None:
    (await client.post("/predict", json={"inputs": text})).raise_for_status()
