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
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from benchmarks.end_to_end import models
from benchmarks.end_to_end.baselines import PEERS, PLAIN, Answering
from benchmarks.end_to_end.forced import FULL, OWN
from benchmarks.end_to_end.measure import REST, answer_fields, header, prepared
from benchmarks.end_to_end.models import FUSED_LAYERS
from benchmarks.end_to_end.suites import Case, baseline, beside, ours
from benchmarks.end_to_end.workloads import Sst2, Workload, padded
from benchmarks.harness import Implementation, Record, Variant, ratio_fields, time_fields
from benchmarks.machine import synchronize
from earlyexit_kernels.tuning.timing import quantiles

Stopwatch: TypeAlias = Callable[[Callable[[], Any]], float]
Answered: TypeAlias = Callable[[dict[str, Tensor]], Iterator[Sequence[int]]]
SUITE = "server"
LARGEST = 64
#: Arrivals per second, over the rows per second of the plain model.
RATES = (0.4, 0.8, 1.2, 2.0)
SESSIONS = 3
CASE = Case("MiniLM", Sst2(LARGEST, 5), (*ours(OWN, engines=(FUSED_LAYERS,)), *beside(PLAIN, *PEERS)))
PLAIN_VARIANT = baseline(PLAIN, "float32", FULL)
#: Rows that leave at or before this layer are early, at the last one late.
EARLY = 2


class Server(NamedTuple):
    """One way to serve a variant.

    Attributes:
        variant: the one whose answers were checked.
        prepare: called before a session.
        answered: answers a batch, and yields the numbers of rows when they are answered.
    """

    variant: Variant
    prepare: Callable[[], Any]
    answered: Answered


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


def _exit_layers(own: Implementation, work: Workload) -> Tensor:
    """Return the layer at which each row leaves by the model's own exits."""
    own.prepare()
    return torch.cat([own.call(batch)[1] for batch in work.batches])


def _servers(ready: Mapping[Variant, Implementation]) -> dict[Variant, Server]:
    """Return the servers by name; our model with its own exits serves whole batches, and streams."""
    found: dict[Variant, Server] = {}
    for variant, one in ready.items():
        found[variant] = Server(variant, one.prepare, whole(one.call))
        if variant.exits == OWN and one.ours:
            streaming = variant._replace(engine=f"{variant.engine}, streaming")
            found[streaming] = Server(variant, one.prepare, streamed(one.model))
    return found


def records(repeats: int, case: Case = CASE, stopwatch: Stopwatch = seconds) -> Iterator[Record]:
    """Yield a record for each server and rate, and one for each skipped variant."""
    torch.set_flush_denormal(True)
    with torch.inference_mode():
        # the "call" of a variant is its answer to one batch: a session decides which rows share one
        work, found, skipped = prepared(SUITE, case, lambda work, answer: answer)
        yield from skipped
        if work is None or PLAIN_VARIANT not in found.ready:
            return
        passes = [
            sum(stopwatch(partial(found.ready[PLAIN_VARIANT].call, batch)) for batch in work.batches) for _ in range(3)
        ]
        capacity = work.rows / sorted(passes)[1]
        queries = [ids[mask.bool()] for b in work.batches for ids, mask in zip(*b.values(), strict=True)]
        servers = _servers(found.ready)
        exits = next((_exit_layers(one, work) for v, one in found.ready.items() if one.ours and v.exits == OWN), None)
        for rate in RATES:
            arrived = [arrivals(rate * capacity, len(queries), seed) for seed in range(min(SESSIONS, repeats))]
            times = _sessions(servers, queries, arrived, stopwatch)
            for named, latencies in times.items():
                is_plain = named == PLAIN_VARIANT
                record = header(SUITE, case, named, "" if is_plain else PLAIN)
                record |= answer_fields(case, found, servers[named].variant)
                record |= {"rate": rate, "rows_per_second": round(rate * capacity, 2), "largest_batch": LARGEST}
                record |= time_fields([1000 * second for session in latencies for second in session])
                record |= {"sessions": len(arrived), "goodput": round(_goodput(latencies, arrived), 2)}
                if exits is not None:
                    record |= _by_depth(latencies, exits, models.subject(case.subject).depth)
                yield record | ({} if is_plain else ratio_fields(*map(_medians, (latencies, times[PLAIN_VARIANT]))))


def _goodput(latencies: Sequence[Sequence[float]], arrived: Sequence[Sequence[float]]) -> float:
    """Return rows answered a second, from the first arrival of a session to its last answer."""
    spans = [
        max(at + wait for at, wait in zip(times, waits, strict=True)) - times[0]
        for times, waits in zip(arrived, latencies, strict=True)
    ]
    return sum(map(len, latencies)) / sum(spans)


def _by_depth(latencies: Sequence[Sequence[float]], exits: Tensor, depth: int) -> Record:
    """Return the median latency of rows that leave early, and of those that leave last, in milliseconds."""
    fields: Record = {}
    for name, rows in {"early": exits <= EARLY, "late": exits == depth}.items():
        times = [1000 * session[row] for session in latencies for row in rows.nonzero()[:, 0].tolist()]
        fields[f"{name}_ms"] = round(quantiles(times, (0.5,))[0], 6) if times else None
    return fields


def _sessions(
    servers: Mapping[Variant, Server],
    queries: Sequence[Tensor],
    arrived: Sequence[Sequence[float]],
    stopwatch: Stopwatch,
) -> dict[Variant, list[list[float]]]:
    """Return the seconds of every row, by server and session; in a session all servers have the same arrivals."""
    latencies: dict[Variant, list[list[float]]] = {name: [] for name in servers}
    order, shuffle = list(servers), random.Random(0).shuffle
    for times in arrived:
        shuffle(order)
        for name in order:
            servers[name].prepare()
            time.sleep(REST)
            latencies[name].append(session(servers[name].answered, queries, times, LARGEST, stopwatch))
    return latencies


def _medians(sessions: Sequence[Sequence[float]]) -> list[float]:
    return [quantiles(session, (0.5,))[0] for session in sessions]
