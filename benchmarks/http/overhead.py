"""One client, one text at a time: the time of a request less that of the model in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

import earlyexit_kernels as ee
from benchmarks.harness import Record
from benchmarks.http.names import LITSERVE, OWN
from benchmarks.http.servers import serving
from earlyexit_kernels.tuning.timing import quantiles

ALONE = "Scorer, no server"


def records(model: Path, work: Path, texts: Sequence[str], requests: int) -> Iterator[Record]:
    """Yield the milliseconds of the scorer alone and of the servers, which take turns."""
    with ExitStack() as stack:
        scorer = ee.Scorer(model, drift_window=None)
        calls: dict[str, Callable[[str], Any]] = {ALONE: lambda text: scorer([text])}
        for name in (OWN, LITSERVE):
            url = stack.enter_context(serving(name, model, work)).url
            client = stack.enter_context(httpx.Client(base_url=url, timeout=60))
            calls[name] = lambda text, client=client: client.post("/predict", json={"inputs": text}).raise_for_status()
        times = in_turns(calls, [texts[n % len(texts)] for n in range(requests)])
    alone = quantiles(times[ALONE], (0.5,))[0]
    for name, found in times.items():
        p50, p99 = quantiles(found, (0.5, 0.99))
        numbers = {"p50_ms": round(p50, 3), "p99_ms": round(p99, 3), "overhead_ms": round(p50 - alone, 3)}
        yield {"suite": "http", "part": "overhead", "server": name, "requests": requests, **numbers}


def in_turns(calls: Mapping[str, Callable[[str], Any]], texts: Sequence[str]) -> dict[str, list[float]]:
    """Return the milliseconds of each call with each text."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for text in texts:
        for name, call in calls.items():
            start = time.perf_counter()
            call(text)
            times[name].append(1000 * (time.perf_counter() - start))
    return times
