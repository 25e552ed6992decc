"""Rows that arrive at random: p50, p90 and p99 of the time from arrival to answer.

Arrivals are a seeded Poisson process, at rates relative to the plain model's throughput on full batches. One server
takes the rows that have arrived, oldest first, up to a largest batch, pads and answers them; if none waits, the clock
moves to the next arrival. Time spent answering is measured, time spent waiting is computed. Variants take turns, one
session each. Our model with its own exits also answers rows as they leave a batch (`stream`).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from benchmarks.end_to_end import models
from benchmarks.end_to_end.baselines import PLAIN, Answering
from benchmarks.end_to_end.engines import FUSED_LAYERS
from benchmarks.end_to_end.forced import FULL, OWN
from benchmarks.end_to_end.measure import REST, answer_fields, header, prepared
from benchmarks.end_to_end.suites import RUNTIMES
from benchmarks.end_to_end.variants import Case
from benchmarks.end_to_end.workloads import Sst2, Workload, padded
from benchmarks.harness import Implementation, Record, Variant, ratio_fields, time_fields
from benchmarks.machine import synchronize
from earlyexit_kernels.tuning.timing import quantiles

Stopwatch: TypeAlias = Callable[[Callable[[], Any]], float]
Answered: TypeAlias = Callable[[dict[str, Tensor]], Iterator[Sequence[int]]]
Server: TypeAlias = tuple[Callable[[], Any], Answered]
SUITE = "server"
LARGEST = 64
#: Arrivals per second, over the rows per second of the plain model.
RATES = (0.4, 0.8, 1.2, 2.0)
SESSIONS = 3
CASES = (Case("MiniLM", Sst2(LARGEST, 5), (OWN,), RUNTIMES, engines=(FUSED_LAYERS,)),)
#: Rows that leave at or before this layer are early, at the last one late.
EARLY = 2


def arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Return the seconds at which rows arrive, a Poisson process of `rate` per second."""
    draw, now, times = random.Random(seed).expovariate, 0.0, []
    for _ in range(count):
        now += draw(rate)
        times.append(now)
    return times


def seconds(call: Callable[[], Any]) -> float:
    """Return the wall-clock time of a call."""
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def session(
    answered: Answered, queries: Sequence[Tensor], arrived: Sequence[float], largest: int, stopwatch: Stopwatch
) -> list[float]:
    """Answer rows in the order of their arrival; return the seconds from arrival to answer of each.

    Args:
        answered: answers a batch, and yields the numbers of rows when they are answered.
        queries: token ids ``[S]`` of each row.
        arrived: seconds, ascending.
        largest: rows of a batch.
        stopwatch: makes a call and returns the seconds that it took.
    """
    now, served, latencies = 0.0, 0, [0.0] * len(arrived)
    while served < len(arrived):
        now = max(now, arrived[served])
        end = served + 1
        while end < min(len(arrived), served + largest) and arrived[end] <= now:
            end += 1
        parts, waiting = answered(padded(queries[served:end])), end - served
        while waiting:
            part: list[Sequence[int]] = []
            now += stopwatch(lambda: part.append(next(parts)))  # noqa: B023  called within this turn
            for row in part[0]:
                latencies[served + row] = now - arrived[served + row]
            waiting -= len(part[0])
        served = end
    return latencies


def whole(answer: Answering) -> Answered:
    """Return a way to answer the rows of a batch together, when it ends."""

    def answered(batch: dict[str, Tensor]) -> Iterator[Sequence[int]]:
        answer(batch)
        yield range(len(batch["input_ids"]))

    return answered


def streamed(model: models.Model) -> Answered:
    """Return a way to answer rows when they leave their batch."""
    return lambda batch: (part.rows.tolist() for part in model.stream(**batch))


#: Ways of serving a model of ours, beside whole batches.
WAYS = {"streaming": streamed}


def records(repeats: int) -> Iterator[Record]:
    """Yield the records of all cases at all rates."""
    torch.set_flush_denormal(True)
    with torch.inference_mode():
        for case in CASES:
            yield from case_records(case, min(SESSIONS, repeats))


def case_records(case: Case, sessions: int, stopwatch: Stopwatch = seconds) -> Iterator[Record]:
    """Yield the records of one case at all rates."""
    # the "call" of a variant is its answer to one batch: a session decides which rows share one
    work, found, skipped = prepared(SUITE, case, lambda work, answer: answer)
    yield from skipped
    plain = Variant(PLAIN, "", "float32", FULL)
    if work is None or plain not in found.ready:
        return
    queries = [ids[mask.bool()] for b in work.batches for ids, mask in zip(*b.values(), strict=True)]
    capacity = _capacity(found.ready[plain].call, work, stopwatch)
    servers = _servers(found.ready)
    own = next((v for v in found.ready if (v.engine, v.exits) == (FUSED_LAYERS, OWN)), None)
    exits = None if own is None else _exit_layers(found.ready[own], work)
    for rate in RATES:
        arrived = [arrivals(rate * capacity, len(queries), seed) for seed in range(sessions)]
        times = _sessions(servers, queries, arrived, stopwatch)
        for (variant, way), latencies in times.items():
            named = variant._replace(engine=f"{variant.engine}, {way}") if way else variant
            fields = {"rate": rate, "rows_per_second": round(rate * capacity, 2), "largest_batch": LARGEST}
            record = header(SUITE, case, named, "" if variant == plain else PLAIN)
            record |= answer_fields(case, found, variant) | fields
            record |= time_fields([1000 * second for session in latencies for second in session])
            record |= {"sessions": sessions, "goodput": round(_goodput(latencies, arrived), 2)}
            record |= {} if exits is None else _by_depth(latencies, exits, models.subject(case.subject).depth)
            yield record | ({} if variant == plain else ratio_fields(*map(_medians, (latencies, times[plain, ""]))))


def _servers(ready: Mapping[Variant, Implementation]) -> dict[tuple[Variant, str], Server]:
    """Return what prepares and what answers, by variant and way of serving; the usual way has no name."""
    found: dict[tuple[Variant, str], Server] = {}
    for variant, one in ready.items():
        found[variant, ""] = one.prepare, whole(one.call)
        if (variant.engine, variant.exits) == (FUSED_LAYERS, OWN):
            found |= {(variant, way): (one.prepare, answered(one.model)) for way, answered in WAYS.items()}
    return found


def _exit_layers(own: Implementation, work: Workload) -> Tensor:
    """Return the layer at which each row leaves by the model's own exits."""
    own.prepare()
    return torch.cat([own.call(batch)[1] for batch in work.batches])


def _goodput(latencies: Sequence[Sequence[float]], arrived: Sequence[Sequence[float]]) -> float:
    """Return rows answered a second, from the first arrival of a session to its last answer."""
    spans = [
        max(at + wait for at, wait in zip(times, own, strict=True)) - times[0]
        for own, times in zip(latencies, arrived, strict=True)
    ]
    return sum(len(own) for own in latencies) / sum(spans)


def _by_depth(latencies: Sequence[Sequence[float]], exits: Tensor, depth: int) -> Record:
    """Return the median latency of rows that leave early, and of those that leave last, in milliseconds."""
    found = {}
    for name, rows in {"early": exits <= EARLY, "late": exits == depth}.items():
        times = [1000 * session[row] for session in latencies for row in rows.nonzero()[:, 0].tolist()]
        found[f"{name}_ms"] = round(quantiles(times, (0.5,))[0], 6) if times else None
    return found


def _capacity(answer: Answering, work: Workload, stopwatch: Stopwatch) -> float:
    """Return the rows per second of the plain model on full batches."""
    passes = [sum(stopwatch(partial(answer, batch)) for batch in work.batches) for _ in range(3)]
    return work.rows / sorted(passes)[1]


def _sessions(
    servers: Mapping[tuple[Variant, str], Server],
    queries: Sequence[Tensor],
    arrived: Sequence[Sequence[float]],
    stopwatch: Stopwatch,
) -> dict[tuple[Variant, str], list[list[float]]]:
    """Return the seconds of every row, by server and session; in a session all servers have the same arrivals."""
    found: dict[tuple[Variant, str], list[list[float]]] = {name: [] for name in servers}
    order, shuffle = list(servers), random.Random(0).shuffle
    for times in arrived:
        shuffle(order)
        for name in order:
            prepare, answered = servers[name]
            prepare()
            time.sleep(REST)
            found[name].append(session(answered, queries, times, LARGEST, stopwatch))
    return found


def _medians(sessions: Sequence[Sequence[float]]) -> list[float]:
    return [quantiles(session, (0.5,))[0] for session in sessions]
