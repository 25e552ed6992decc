"""Rows that arrive at random: p50, p90 and p99 of the time from arrival to answer.

Arrivals are a seeded Poisson process, at rates relative to the plain model's throughput on full batches. One server
takes the rows that have arrived, oldest first, up to a largest batch, pads and answers them; if none waits, the clock
moves to the next arrival. Time spent answering is measured, time spent waiting is computed. Variants take turns, one
session each.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from benchmarks.end_to_end.baselines import PLAIN, Answering
from benchmarks.end_to_end.forced import FULL, NEVER, OWN
from benchmarks.end_to_end.measure import REST, answer_fields, header, prepared
from benchmarks.end_to_end.suites import HALF, RUNTIMES
from benchmarks.end_to_end.variants import Case
from benchmarks.end_to_end.workloads import Sst2, Workload, padded
from benchmarks.harness import Implementation, Record, Variant, ratio_fields, time_fields
from benchmarks.machine import synchronize
from earlyexit_kernels.tuning.timing import quantiles

Stopwatch: TypeAlias = Callable[[Callable[[], Any]], float]
SUITE = "server"
LARGEST = 16
#: Arrivals per second, over the rows per second of the plain model.
RATES = (0.4, 0.8, 1.2)
SESSIONS = 2
CASES = (Case("MiniLM", Sst2(LARGEST, 8), (NEVER, OWN, HALF), RUNTIMES),)


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


def serve(
    answer: Answering, queries: Sequence[Tensor], arrived: Sequence[float], largest: int, stopwatch: Stopwatch
) -> list[float]:
    """Answer rows in the order of their arrival; return the seconds from arrival to answer of each.

    Args:
        answer: answers a batch.
        queries: token ids ``[S]`` of each row.
        arrived: seconds, ascending.
        largest: rows of a batch.
        stopwatch: makes a call and returns the seconds that it took.
    """
    now, served, latencies = 0.0, 0, []
    while served < len(arrived):
        now = max(now, arrived[served])
        end = served + 1
        while end < min(len(arrived), served + largest) and arrived[end] <= now:
            end += 1
        now += stopwatch(lambda: answer(padded(queries[served:end])))  # noqa: B023  called within this turn
        latencies += [now - at for at in arrived[served:end]]
        served = end
    return latencies


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
    for rate in RATES:
        arrived = [arrivals(rate * capacity, len(queries), seed) for seed in range(sessions)]
        times = _sessions(found.ready, queries, arrived, stopwatch)
        for variant, own in times.items():
            fields = {"rate": rate, "rows_per_second": round(rate * capacity, 2), "largest_batch": LARGEST}
            record = header(SUITE, case, variant, "" if variant == plain else PLAIN)
            record |= answer_fields(case, found, variant) | fields
            record |= time_fields([1000 * second for session in own for second in session]) | {"sessions": sessions}
            yield record | ({} if variant == plain else ratio_fields(*map(_medians, (own, times[plain]))))


def _capacity(answer: Answering, work: Workload, stopwatch: Stopwatch) -> float:
    """Return the rows per second of the plain model on full batches."""
    passes = [sum(stopwatch(partial(answer, batch)) for batch in work.batches) for _ in range(3)]
    return work.rows / sorted(passes)[1]


def _sessions(
    ready: Mapping[Variant, Implementation],
    queries: Sequence[Tensor],
    arrived: Sequence[Sequence[float]],
    stopwatch: Stopwatch,
) -> dict[Variant, list[list[float]]]:
    """Return the seconds of every row, by variant and session; in a session all variants have the same arrivals."""
    found: dict[Variant, list[list[float]]] = {variant: [] for variant in ready}
    order, shuffle = list(ready), random.Random(0).shuffle
    for times in arrived:
        shuffle(order)
        for variant in order:
            ready[variant].prepare()
            time.sleep(REST)
            found[variant].append(serve(ready[variant].call, queries, times, LARGEST, stopwatch))
    return found


def _medians(sessions: Sequence[Sequence[float]]) -> list[float]:
    return [quantiles(session, (0.5,))[0] for session in sessions]
