"""What we set out to reach on an H200, line by line; a record that belongs to a line names it under ``bar``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.end_to_end.goals import Goal

#: Host synchronisations, launches and so on are numbers of a record; ``ratio`` is ours over the baseline's time.
GOALS: dict[str, Goal] = {
    "exit step: launches": Goal(1, "launches"),
    "exit step: microseconds in a graph": Goal(5, "median_us"),
    "exit step over the torch chain, both in graphs": Goal(1 / 8),
    "exit step over the compiled chain, both in graphs": Goal(1 / 2),
    "exit step in a graph over the torch chain, launched by the host": Goal(1 / 8),
    "exit step in a graph over the compiled chain, launched by the host": Goal(1 / 2),
    "mean pooling over the time of its bytes, B 128": Goal(1.3),
    **{f"never exit over torch.compile, B {rows}": Goal(most) for rows, most in ((1, 1.0), (32, 1.05), (128, 1.05))},
    **{f"mean depth 6 over torch.compile, B {rows}": Goal(most) for rows, most in ((1, 0.55), (32, 0.56), (128, 0.58))},
    **{f"mean depth 6 over padded torch.compile, ragged, B {rows}": Goal(0.40) for rows in (32, 128)},
    "mean depth 6 over the item loop, B 1": Goal(1 / 8),
    "host synchronisations a batch": Goal(1, "syncs"),
    "rows whose bits differ alone and in 8, 32 and 128": Goal(0, "different"),
    "errors that compute-sanitizer finds": Goal(0, "errors"),
}


def line(bar: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """A record's fields about its line of the bar; none where the bar has no such line."""
    goal = GOALS.get(bar)
    if goal is None:
        return {}
    return {"bar": bar, "goal": goal.value, "goal_of": goal.of, "goal_met": goal.met(record)}
