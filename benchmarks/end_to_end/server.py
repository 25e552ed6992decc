"""Rows that arrive by chance: p50, p90 and p99 of the time from arrival to answer.

Arrivals are a seeded Poisson process, at rates relative to what the plain model can do when it always has a full batch.
One server takes what has arrived, oldest first, up to a largest batch, pads it and answers it; when nothing waits, the
clock moves on to the next arrival. Time spent answering is measured, time spent waiting is computed, so idling costs
nothing. Contenders take turns, a session each.
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
from benchmarks.end_to_end.contenders import Case, Contender, Said
from benchmarks.end_to_end.forced import FULL, NEVER, OWN
from benchmarks.end_to_end.measure import REST, entered, head, standing
from benchmarks.end_to_end.single_stream import RUNTIMES
from benchmarks.end_to_end.workloads import Sst2, Workload, padded
from earlyexit_kernels.tuning.timing import paired_ratio, quantiles

Stopwatch: TypeAlias = Callable[[Callable[[], Any]], float]
SUITE = "server"
LARGEST = 16
#: Arrivals a second, over the rows a second of the plain model.
RATES = (0.4, 0.8, 1.2)
SESSIONS = 2
CASES = (Case("MiniLM", Sst2(LARGEST, 8), (NEVER, OWN, "uniform, 50 %"), RUNTIMES),)


def arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Seconds at which rows arrive, a Poisson process of `rate` a second."""
    draw, now, times = random.Random(seed).expovariate, 0.0, []
    for _ in range(count):
        now += draw(rate)
        times.append(now)
    return times


def seconds(call: Callable[[], Any]) -> float:
    """Wall-clock of a call."""
    start = time.perf_counter()
    call()
    if models.device() == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def serve(
    answer: Answering, queries: Sequence[Tensor], arrived: Sequence[float], largest: int, stopwatch: Stopwatch
) -> list[float]:
    """Answer rows in the order of their arrival, and return the seconds each took from arrival to answer.

    Args:
        answer: of a batch.
        queries: token ids ``[S]`` of each row.
        arrived: seconds, ascending.
        largest: rows of a batch.
        stopwatch: calls, and returns the seconds that took.
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


def records(repeats: int) -> Iterator[dict[str, Any]]:
    """All cases at all rates; a record for each contender."""
    torch.set_flush_denormal(True)
    with torch.inference_mode():
        for case in CASES:
            yield from case_records(case, min(SESSIONS, repeats))


def case_records(case: Case, sessions: int, stopwatch: Stopwatch = seconds) -> Iterator[dict[str, Any]]:
    """One case at all rates."""
    entry = entered(SUITE, case)
    yield from entry.left_out
    plain = Said(PLAIN, "", "float32", FULL)
    if entry.work is None or plain not in entry.contenders:
        return
    queries = [ids[mask.bool()] for b in entry.work.batches for ids, mask in zip(*b.values(), strict=True)]
    capacity = _capacity(entry.contenders[plain], entry.work, stopwatch)
    for rate in RATES:
        arrived = [arrivals(rate * capacity, len(queries), seed) for seed in range(sessions)]
        found = _sessions(entry.contenders, queries, arrived, stopwatch)
        for said in found:
            fields = {"rate": rate, "rows_per_second": round(rate * capacity, 2), "largest_batch": LARGEST}
            record = head(SUITE, case, said, "" if said == plain else PLAIN) | standing(case, entry, said) | fields
            compared = {} if said == plain else _compared(found[said], found[plain])
            yield record | {"sessions": sessions} | _numbers(found[said]) | compared


def _capacity(plain: Contender, work: Workload, stopwatch: Stopwatch) -> float:
    """Rows a second of the plain model on full batches."""
    passes = [sum(stopwatch(partial(plain.answer, batch)) for batch in work.batches) for _ in range(3)]
    return work.rows / sorted(passes)[1]


def _sessions(
    contenders: Mapping[Said, Contender],
    queries: Sequence[Tensor],
    arrived: Sequence[Sequence[float]],
    stopwatch: Stopwatch,
) -> dict[Said, list[list[float]]]:
    """Seconds of every row, by contender and session; in a session all meet the same arrivals."""
    found: dict[Said, list[list[float]]] = {said: [] for said in contenders}
    order, shuffle = list(contenders), random.Random(0).shuffle
    for times in arrived:
        shuffle(order)
        for said in order:
            contenders[said].ready()
            time.sleep(REST)
            found[said].append(serve(contenders[said].answer, queries, times, LARGEST, stopwatch))
    return found


def _numbers(sessions: Sequence[Sequence[float]]) -> dict[str, float]:
    everything = [second for session in sessions for second in session]
    values = quantiles(everything, (0.5, 0.9, 0.99))
    return {name: round(1000 * x, 3) for name, x in zip(("median_ms", "p90_ms", "p99_ms"), values, strict=True)}


def _compared(sessions: Sequence[Sequence[float]], plain: Sequence[Sequence[float]]) -> dict[str, float]:
    """Median latencies of the sessions over the plain model's."""
    middle, baseline = ([quantiles(session, (0.5,))[0] for session in x] for x in (sessions, plain))
    return paired_ratio(middle, baseline).fields()
