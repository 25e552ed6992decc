"""The suites of a GPU, in the order in which ``make gpu-check`` runs them.

Those of whole models are cases in BERT-base's shape: captured layers and the family's, beside the stock model, plain
and compiled. They are checked, timed and recorded as on a CPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from benchmarks.end_to_end import measure
from benchmarks.end_to_end.baselines import COMPILED_WHOLE, PLAIN
from benchmarks.end_to_end.forced import NEVER
from benchmarks.end_to_end.models import CAPTURED_LAYERS, FAMILY_LAYERS
from benchmarks.end_to_end.suites import Case, beside, half_of, ours
from benchmarks.end_to_end.workloads import Fixed, Ragged, Sst2, Work
from benchmarks.gpu import costs, exits
from benchmarks.gpu.bench import SUBJECT, Bench
from benchmarks.harness import Record
from benchmarks.machine import DATA_VARIABLE

ROUNDS_PER_REPEAT = 5


def ragged_rows(rows: int) -> Work:
    """Return rows of natural lengths where the text is, else of generated ones."""
    return Sst2(rows, 1) if os.environ.get(DATA_VARIABLE) else Ragged(rows)


def whole(bench: Bench, suite: str, *, batches: tuple[int, ...], dtype: str, ragged: bool = False) -> Iterator[Record]:
    """Yield never exit and exits at mean depth 6 of some batches, full ones unless `ragged`."""
    engines, dtypes = (FAMILY_LAYERS, CAPTURED_LAYERS), (dtype,)
    cases = []
    for rows in batches:
        work = ragged_rows(rows) if ragged else Fixed(rows, bench.length)
        variants = ours(NEVER, half_of(rows), engines=engines, dtypes=dtypes)
        variants += beside(PLAIN, COMPILED_WHOLE, dtypes=dtypes)
        cases.append(Case(SUBJECT, work, variants, compared=(COMPILED_WHOLE,)))
    return measure.records(suite, cases, 0, rounds=bench.rounds, warmup=bench.warmup)


def _full(dtype: str) -> dict[str, Callable[[Bench], Iterator[Record]]]:
    names = {rows: f"gpu_whole_{dtype}_{rows}" for rows in (1, 32, 128)}
    return {name: partial(whole, suite=name, batches=(rows,), dtype=dtype) for rows, name in names.items()}


RAGGED = "gpu_ragged_float16"
SUITES: dict[str, Callable[[Bench], Iterator[Record]]] = {
    costs.SUITE: costs.records,
    **_full("float16"),
    exits.SUITE: exits.records,
    **_full("bfloat16"),
    RAGGED: partial(whole, suite=RAGGED, batches=(32, 128), dtype="float16", ragged=True),
}


def records(name: str, repeats: int) -> Iterator[Record]:
    """Yield the records of one of `SUITES` on this machine's GPU.

    Raises:
        NotMeasuredError: there is none.
    """
    yield from SUITES[name](replace(Bench.here(), rounds=ROUNDS_PER_REPEAT * repeats))
