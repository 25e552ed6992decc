"""What a decision costs: each rule at a middle layer, from ready logits, over what entropy costs there.

The op is called as the engine calls it, without `exit_step`'s checks. Every rule stands in the middle of its grid, DACT
without a threshold at both its bounds, and starts from the state that five layers have left it. Row ids, state and
answers are put back between timings, outside of the clock; one timing runs the op on many copies of them, so that each
call finds its rows present. All rules of a batch size take turns; ratios are medians of per-round ratios with their .2
and .8 quantiles. ``entropy, again`` is the same rule timed twice: what its ratio is off 1 is noise. Run with
``python -m benchmarks.run --suite decision_cost``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.micro.decisions import Decision, middle_settings, on_device, random_trace, untimeable
from benchmarks.micro.measure import DEVICE, synchronize
from earlyexit_kernels.criteria import Criterion, Dact
from earlyexit_kernels.tuning.timing import interleave, paired_ratio, quantiles
from earlyexit_kernels.types import ExitTrace

SUITE = "decision_cost"
BATCHES = (32, 256, 1024)
#: Back-end -> calls of the op in one timing, some milliseconds together; a single one would drown in noise.
CALLS = {"torch": 16, "triton": 64, "cpp": 64}
ROUNDS_A_REPEAT = 5
BASELINE, AGAIN = "entropy", "entropy, again"
#: Rule -> the ratio to entropy that was set as a goal.
GOALS = {"voting": 1.3, "dact": 1.3}


def rules(trace: ExitTrace) -> dict[str, Criterion]:
    """Every rule that decides at a middle layer, at the middle of its grid, and entropy a second time."""
    found = middle_settings(trace)
    return {**found, "dact, tight": Dact(bound="tight"), AGAIN: found[BASELINE]}


def records(repeats: int) -> Iterator[dict[str, Any]]:
    """One record for each back-end, batch size and rule; back-ends that can't be timed here say why."""
    for backend, why_not in untimeable(DEVICE).items():
        if why_not:
            yield {"suite": SUITE, "backend": backend, "device": DEVICE, "not_measured": why_not}
            continue
        for rows in BATCHES:
            on_cpu = random_trace(rows)
            trace = on_device(on_cpu, DEVICE)
            decisions = {name: Decision(rule, trace, backend, CALLS[backend]) for name, rule in rules(on_cpu).items()}
            times = interleave(
                decisions,
                repeats=ROUNDS_A_REPEAT * repeats,
                sync=synchronize,
                prepare=lambda name: decisions[name].restore(),  # noqa: B023  called within this turn of the loop
                progress=f"{backend}, B {rows}",
            )
            for name, decision in decisions.items():
                yield {
                    "suite": SUITE,
                    "backend": backend,
                    "device": DEVICE,
                    "rule": name,
                    "criterion": decision.rule.to_dict(),
                    "rows": rows,
                    "left": decision.left,
                    "microseconds": round(quantiles(times[name], (0.5,))[0] * 1000 / len(decision.copies), 3),
                    **paired_ratio(times[name], times[BASELINE]).fields(),
                    "goal": GOALS.get(name),
                }
