"""Whole models in BERT-base's shape: captured layers and the family's, beside the stock model, plain and compiled.

Answers are checked, variants timed and records made as in `benchmarks.end_to_end`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import torch

from benchmarks.end_to_end import measure, models
from benchmarks.end_to_end.baselines import COMPILED_WHOLE, PLAIN
from benchmarks.end_to_end.engines import CAPTURED_LAYERS, FAMILY_LAYERS, engine_model, refused_captures
from benchmarks.end_to_end.forced import NEVER
from benchmarks.end_to_end.variants import Case
from benchmarks.end_to_end.workloads import Fixed, Ragged, Sst2, Work
from benchmarks.goals import gpu_goal
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.prediction import half_of
from benchmarks.harness import Record
from benchmarks.machine import DATA_VARIABLE

SUBJECT = "BERT-base"
#: Fields of a record that was timed.
TIMED = ("median_ms", "low_ms", "high_ms", "p90_ms", "p99_ms", "ratio", "ratio_low", "ratio_high")


def whole_records(bench: Bench, suite: str, *, rows: int, dtype: str, ragged: bool) -> Iterator[Record]:
    """Yield never exit and exits at mean depth 6 of one batch; captured layers that fell back are refused.

    Args:
        bench: sizes and rounds.
        suite: for the records.
        rows, dtype: of the batch.
        ragged: SST-2's lengths, or generated ones without the data; otherwise all rows are full.
    """
    case = Case(
        SUBJECT,
        ragged_rows(rows) if ragged else Fixed(rows, bench.length),
        (NEVER, half_of(rows)),
        (COMPILED_WHOLE,),
        half_of(rows),
        (dtype,),
        engines=(FAMILY_LAYERS, CAPTURED_LAYERS),
        narrow_baselines=(PLAIN, COMPILED_WHOLE),
        compared=(COMPILED_WHOLE,),
    )
    with torch.inference_mode():
        for record in measure.case_records(suite, case, 0, rounds=bench.rounds, warmup=bench.warmup):
            own = {name: x for name, x in record.items() if name not in ("goal", "goal_of", "goal_met")}
            if record["engine"] == CAPTURED_LAYERS and "median_ms" in record:
                # called as in `variants`, so that it is the model that was timed
                model = engine_model(models.subject(SUBJECT, dtype), CAPTURED_LAYERS, "auto", family=False)
                if reason := refused_captures(model):
                    yield {name: x for name, x in own.items() if name not in TIMED} | {"refused": reason}
                    continue
            yield own | gpu_goal(_goal_name(record, rows, ragged), record)


def ragged_rows(rows: int) -> Work:
    """Return rows of natural lengths where the text is, else of generated ones."""
    return Sst2(rows, 1) if os.environ.get(DATA_VARIABLE) else Ragged(rows)


def _goal_name(record: Mapping[str, object], rows: int, ragged: bool) -> str:
    """Return the name of a record's goal, or ``""``."""
    if ragged or (record["engine"], record["baseline"]) != (CAPTURED_LAYERS, COMPILED_WHOLE):
        return ""
    return f"{'never exit' if record['exits'] == NEVER else 'mean depth 6'} over torch.compile, B {rows}"


#: Name of a section -> rows of its batches, dtype, and whether they are ragged.
CASES: dict[str, tuple[tuple[int, ...], str, bool]] = {
    **{f"whole_{dtype}_{rows}": ((rows,), dtype, False) for dtype in ("float16", "bfloat16") for rows in (1, 32, 128)},
    "ragged_float16": ((32, 128), "float16", True),
}


def records(name: str, bench: Bench) -> Iterator[Record]:
    """Yield the records of one of `CASES`."""
    batches, dtype, ragged = CASES[name]
    for rows in batches:
        yield from whole_records(bench, f"gpu_{name}", rows=rows, dtype=dtype, ragged=ragged)
