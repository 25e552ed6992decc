"""One client, one text at a time: the time of a request less that of the model in this process."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import earlyexit_kernels as ee
from benchmarks.harness import Record
from benchmarks.http.names import LITSERVE, OWN
from benchmarks.http.servers import serving
from earlyexit_kernels.tuning.timing import quantiles

#: Seconds of rest in which threads of the process before stop spinning.
REST = 0.02
ALONE = "Scorer, no server"


def records(model: Path, work: Path, texts: Sequence[str], requests: int) -> Iterator[Record]:
    """Yield the milliseconds of the scorer alone and of the servers, which take turns."""
    with ExitStack() as stack:
        scorer = ee.Scorer(model, drift_window=None)
        calls: dict[str, Callable[[str], Any]] = {ALONE: lambda text: scorer([text])}
        for name in (OWN, LITSERVE):
            url = stack.enter_context(serving(name, model, work)).url
            parts = urlsplit(url)
            calls[name] = partial(ask, HTTPConnection(str(parts.hostname), parts.port))
        times = in_turns(calls, [texts[n % len(texts)] for n in range(requests)])
    alone = quantiles(times[ALONE], (0.5,))[0]
    for name, found in times.items():
        p50, p99 = quantiles(found, (0.5, 0.99))
        numbers = {"p50_ms": round(p50, 3), "p99_ms": round(p99, 3), "overhead_ms": round(p50 - alone, 3)}
        yield {"suite": "http", "part": "overhead", "server": name, "requests": requests, **numbers}


def ask(connection: HTTPConnection, text: str) -> None:
    """Ask a server for the answer to a text.

    Raises:
        RuntimeError: it has no answer.
    """
    connection.request("POST", "/predict", json.dumps({"inputs": text}), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    content = answer.read()
    if answer.status != 200:
        raise RuntimeError(f"expected status 200, got {answer.status}: {content[:200]!r}")


def in_turns(calls: Mapping[str, Callable[[str], Any]], texts: Sequence[str]) -> dict[str, list[float]]:
    """Return the milliseconds of each call with each text."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for text in texts:
        for name, call in calls.items():
            time.sleep(REST)
            start = time.perf_counter()
            call(text)
            times[name].append(1000 * (time.perf_counter() - start))
    return times
