"""Measures one case of whole models: prepares and checks the variants, times them in turns, and makes the records."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from benchmarks import harness
from benchmarks.end_to_end import models
from benchmarks.end_to_end.baselines import LEAVE_EARLY, PLAIN, Answering
from benchmarks.end_to_end.forced import FULL
from benchmarks.end_to_end.peers import RUNTIMES
from benchmarks.end_to_end.suites import Case, baseline
from benchmarks.end_to_end.variants import builders
from benchmarks.end_to_end.workloads import Workload
from benchmarks.goals import OWN_FULL, PEER, whole_goal
from benchmarks.harness import PreparedCase, Record, Variant
from benchmarks.machine import NotMeasuredError, device
from earlyexit_kernels.tuning.timing import quantiles

#: Milliseconds of a case's rounds per repeat asked for; long rounds are repeated less often, but at least these times.
BUDGET_MS = 250.0
MIN_ROUNDS, MAX_ROUNDS_PER_REPEAT = 5, 10
#: Seconds of rest before each timed call: threads of the previous runtime spin for some milliseconds.
REST = 0.02


def records(
    suite: str, cases: Sequence[Case], repeats: int, *, rounds: int | None = None, warmup: int = 0
) -> Iterator[Record]:
    """Time cases; yield a record for each variant and baseline, and one for each skipped variant.

    Args:
        suite: for the records.
        cases: each is timed by itself.
        repeats: how much time the rounds of a case may take.
        rounds, warmup: exactly so many rounds, in place of the time, after so many untimed ones.
    """
    torch.set_flush_denormal(True)
    with torch.inference_mode():
        for case in cases:
            yield from _case_records(suite, case, repeats, rounds=rounds, warmup=warmup)


def prepared(
    suite: str, case: Case, call: Callable[[Workload, Answering], Callable[[], Any]]
) -> tuple[Workload | None, PreparedCase, list[Record]]:
    """Return a case's batches (None if they cannot be built), its prepared variants, and records of those skipped."""
    try:
        work = case.work.build(models.subject(case.subject))
    except NotMeasuredError as error:
        return None, PreparedCase(), [header(suite, case, Variant("everything")) | {"not_measured": str(error)}]
    found = harness.prepare(builders(case, work, lambda answer: call(work, answer)))
    return work, found, list(found.skipped_records(lambda variant: header(suite, case, variant)))


def _case_records(suite: str, case: Case, repeats: int, **how: Any) -> Iterator[Record]:
    call = _next_batch if case.one_by_one else _all_batches
    work, found, skipped = prepared(suite, case, call)
    yield from skipped
    if work is None:
        return
    times = _times_of(case, work, found, repeats, **how)
    for variant, own_times in times.items():
        layer_rows = found.facts[variant]["layer_rows"]
        own = answer_fields(case, found, variant) | _numbers(case, work, own_times)
        baselines = _baselines(case, variant, found.ready[variant].ours, times)
        if not baselines:
            yield header(suite, case, variant) | own
        for name, other in baselines.items():
            compared = _compared(layer_rows, own_times, times[other], other)
            record = header(suite, case, variant, name) | own | compared | {"against": other.engine}
            yield record | whole_goal(record, ours=found.ready[variant].ours)


def header(suite: str, case: Case, variant: Variant, baseline: str = "") -> Record:
    """Return the fields that identify a record."""
    label = ", ".join(word for word in (case.subject, variant.exits, case.work.name) if word)
    fields = harness.record_header(suite, label, variant, shape=case.work.name, baseline=baseline)
    return fields | {"subject": case.subject}


def answer_fields(case: Case, found: PreparedCase, variant: Variant) -> Record:
    """Return a record's fields about the model and the answers."""
    subject, facts = models.subject(case.subject), found.facts[variant]
    return {
        "weights": subject.weights,
        "depth": subject.depth,
        "layer_rows": round(facts["layer_rows"], 4),
        "mean_exit_layer": round(facts["layer_rows"] * subject.depth, 3),
        **{name: facts[name] for name in ("flips", "error")},
    }


def _times_of(
    case: Case, work: Workload, found: PreparedCase, repeats: int, *, rounds: int | None, warmup: int
) -> dict[Variant, list[float]]:
    """Return the milliseconds of each call. All variants have been called once, when they were checked."""
    on_gpu = device() == "cuda"
    how: dict[str, Any] = {
        "sync": torch.cuda.synchronize if on_gpu else None,
        "prepare": rest,
        # calls of some milliseconds, beside runtimes whose threads wake up differently
        "awake": case.stored,
        "progress": f"{case.subject}, {case.work.name}",
    }
    if rounds is None:
        one_round = sum(times[0] + 1000 * REST for times in found.times(rounds=1, **how).values())
        rounds = rounds_of(case.weight * repeats, one_round)
    if case.one_by_one:
        # every row equally often: shares of layer-rows are of all of them
        rounds = max(rounds // len(work.batches), 1) * len(work.batches)
    return found.times(rounds=rounds, warmup=warmup, **how)


def rest() -> None:
    """Let the threads of the previous runtime go to sleep."""
    time.sleep(0 if device() == "cuda" else REST)


def rounds_of(repeats: float, milliseconds: float) -> int:
    """Return how often a round that takes some milliseconds is repeated."""
    fit = min(repeats * BUDGET_MS / max(milliseconds, 1e-3), MAX_ROUNDS_PER_REPEAT * repeats)
    return max(int(fit), min(max(MIN_ROUNDS, int(repeats / 4)), int(repeats)), 1)


def _all_batches(work: Workload, answer: Answering) -> Callable[[], None]:
    def call() -> None:
        for batch in work.batches:
            answer(batch)

    return call


def _next_batch(work: Workload, answer: Answering) -> Callable[[], None]:
    """Answer the next batch in turn; in a round all variants have the same one."""
    turns = itertools.cycle(work.batches)
    return lambda: answer(next(turns))


#: Type of stored weights -> the arithmetic of the runtimes beside it, where that is another one.
BESIDE = {"float16": "float32"}


def _baselines(case: Case, variant: Variant, ours: bool, times: Mapping[Variant, Any]) -> dict[str, Variant]:
    """Return name of the baseline -> the variant of this case that it is."""
    dtype, exits = variant.dtype, variant.exits
    found = {PLAIN: baseline(PLAIN, "float32", FULL)}
    if dtype != "float32":
        found[f"{PLAIN}, {dtype}"] = baseline(PLAIN, dtype, FULL)
    if ours:
        peers = [v for v in times if v.engine in RUNTIMES and v.dtype == BESIDE.get(dtype, dtype)]
        if peers:
            found[PEER] = min(peers, key=lambda other: quantiles(times[other], (0.5,)))
        found[OWN_FULL] = variant._replace(exits=FULL)
        found |= {name: baseline(name, dtype, exits) for name in case.compared}
    return {name: other for name, other in found.items() if other in times and other != variant}


def _numbers(case: Case, work: Workload, times: Sequence[float]) -> Record:
    rows = work.rows // len(work.batches) if case.one_by_one else work.rows
    found = harness.time_fields(times)
    rate = {"rows_per_second": round(1000 * rows / found["median_ms"], 2)}
    return {"rows": rows, "tokens": round(work.tokens, 4), **found, **rate}


def _compared(layer_rows: float, times: Sequence[float], baseline: Sequence[float], against: Variant) -> Record:
    """Return the ratio to a baseline, and the share of layers run over that of the time if the baseline runs all."""
    ratio = harness.ratio_fields(times, baseline)
    if against.engine in LEAVE_EARLY:
        return ratio
    return ratio | {"efficiency": round(layer_rows / ratio["ratio"], 4)}
