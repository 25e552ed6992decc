"""The suites of a GPU, in the order in which ``make gpu-check`` runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from benchmarks.gpu import costs, exits, whole
from benchmarks.gpu.bench import Bench
from benchmarks.harness import Record

ROUNDS_PER_REPEAT = 5
_WHOLE = {f"gpu_{name}": partial(whole.records, name) for name in whole.CASES}
SUITES: dict[str, Callable[[Bench], Iterator[Record]]] = {
    costs.SUITE: costs.records,
    **{name: records for name, records in _WHOLE.items() if "whole_float16" in name},
    exits.SUITE: exits.records,
    **{name: records for name, records in _WHOLE.items() if "whole_float16" not in name},
}


def records(name: str, repeats: int) -> Iterator[Record]:
    """Yield the records of one of `SUITES` on this machine's GPU.

    Raises:
        NotMeasuredError: there is none.
    """
    yield from SUITES[name](replace(Bench.here(), rounds=ROUNDS_PER_REPEAT * repeats))
