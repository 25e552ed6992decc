"""Cost of a decision: each criterion at a middle layer, from ready logits, over the cost of entropy there.

The op is called as the engine calls it, without `exit_step`'s checks. Every criterion is in the middle of its grid;
DACT has no threshold, with either bound. One timing runs the op on many copies of row ids, state and answers, which are
restored in between. ``entropy, again`` is entropy timed twice, which shows the noise.
Run with ``python -m benchmarks.run --suite decision_cost``.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.harness import (
    Goal,
    Implementation,
    PreparedCase,
    Record,
    Variant,
    goal_fields,
    ratio_fields,
    time_fields,
)
from benchmarks.machine import device, synchronize
from benchmarks.micro.decisions import Decision, middle_settings, random_trace, untimeable
from earlyexit_kernels.criteria import Criterion, Dact
from earlyexit_kernels.types import ExitTrace

SUITE = "decision_cost"
BATCHES = (32, 256, 1024)
#: Back-end -> calls of the op in one timing; a single one is too short for the clock.
CALLS = {"torch": 16, "triton": 64, "cpp": 64}
ROUNDS_PER_REPEAT = 5
BASELINE, AGAIN = "entropy", "entropy, again"
#: Criterion -> the ratio to entropy that is its goal.
GOALS = {"voting": Goal(1.3), "dact": Goal(1.3)}


def rules(trace: ExitTrace) -> dict[str, Criterion]:
    """Return every criterion that decides at a middle layer, in the middle of its grid, and entropy a second time."""
    found = middle_settings(trace)
    return {**found, "dact, tight": Dact(bound="tight"), AGAIN: found[BASELINE]}


def records(repeats: int) -> Iterator[Record]:
    """Yield a record for each back-end, batch size and criterion, and for each back-end that cannot be timed here."""
    for backend, reason in untimeable(device()).items():
        if reason:
            yield {"suite": SUITE, "backend": backend, "device": device(), "not_measured": reason}
            continue
        for rows in BATCHES:
            yield from _records_of(backend, rows, repeats)


def _records_of(backend: str, rows: int, repeats: int) -> Iterator[Record]:
    trace = random_trace(rows, device=device())
    decisions = {
        name: Decision(rule, trace, backend, CALLS[backend]) for name, rule in rules(random_trace(rows)).items()
    }
    variants = {name: Variant(name, backend, "float32") for name in decisions}
    case = PreparedCase({v: Implementation(v, decisions[n], prepare=decisions[n].restore) for n, v in variants.items()})
    times = case.times(rounds=ROUNDS_PER_REPEAT * repeats, warmup=3, sync=synchronize, progress=f"{backend}, B {rows}")
    for name, decision in decisions.items():
        fields = {"suite": SUITE, "backend": backend, "device": device(), "rule": name, "rows": rows}
        fields |= {"criterion": decision.rule.to_dict(), "left": decision.left}
        own = time_fields(times[variants[name]], len(decision.copies))
        ratio = ratio_fields(times[variants[name]], times[variants[BASELINE]])
        goal = goal_fields(GOALS.get(name), ratio)
        yield fields | {"microseconds": round(1000 * own["median_ms"], 3)} | ratio | {"goal": goal["goal"]}
