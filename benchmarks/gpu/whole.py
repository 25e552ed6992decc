"""Whole models of BERT-base's shape: the graph engine beside the stock model, compiled into graphs of its own.

What takes turns, how answers are checked and what a record holds is that of `benchmarks.end_to_end`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping

import torch

from benchmarks.end_to_end import measure, models
from benchmarks.end_to_end.baselines import COMPILED_WHOLE, ITEM_LOOP, PLAIN
from benchmarks.end_to_end.contenders import Case, Work
from benchmarks.end_to_end.engines import FAMILY_LAYERS, GRAPH
from benchmarks.end_to_end.forced import NEVER, rule_for
from benchmarks.end_to_end.workloads import Fixed, Ragged, Sst2
from benchmarks.gpu.bench import Bench, Record, beside, head, middle
from benchmarks.gpu.goals import line
from earlyexit_kernels.engine import graphs
from earlyexit_kernels.engine.graphs import bucket_of
from earlyexit_kernels.engine.resident import ResidentLoop, why_not_resident
from earlyexit_kernels.tasks.sources import DATA_VARIABLE

CONDITIONAL, FASTEST = "gpu_conditional", "gpu_fastest"
SUBJECT = "BERT-base"
#: Exits of mean depth 6 of 12: of one row, and of several.
ONE_AT_HALF, HALF = "all at 50 %", "uniform, 50 %"
#: Rounds that the large batches of the table of the fastest get.
FEW_ROUNDS = 20


def half_of(rows: int) -> str:
    """The mix whose rows run half of the layers."""
    return ONE_AT_HALF if rows == 1 else HALF


def whole_records(bench: Bench, suite: str, *, rows: int, dtype: str, ragged: bool) -> Iterator[Record]:
    """One batch: never exit and exits at mean depth 6, by the graph engine and the eager one, beside the baselines.

    Args:
        bench: where.
        suite: for the records.
        rows, dtype: of the batch.
        ragged: SST-2's lengths, or generated ones where the data isn't there; otherwise all rows are full.
    """
    baselines = (COMPILED_WHOLE, ITEM_LOOP) if rows == 1 else (COMPILED_WHOLE,)
    case = Case(
        SUBJECT,
        _ragged(rows) if ragged else Fixed(rows, bench.length),
        (NEVER, half_of(rows)),
        baselines,
        half_of(rows),
        (dtype,),
        engines=(FAMILY_LAYERS, GRAPH),
        narrow_baselines=(PLAIN, *baselines),
        compared=baselines,
    )
    with torch.inference_mode():
        for record in measure.case_records(suite, case, 0, rounds=bench.rounds, warmup=bench.warmup):
            yield record | line(_bar(record, rows, ragged), record)


def _ragged(rows: int) -> Work:
    return Sst2(rows, 1) if os.environ.get(DATA_VARIABLE) else Ragged(rows)


def _bar(record: Mapping[str, object], rows: int, ragged: bool) -> str:
    """The line of the bar that a record belongs to, or one that there isn't."""
    if record["engine"] != GRAPH or "ratio" not in record:
        return ""
    what = "never exit" if record["exits"] == NEVER else "mean depth 6"
    compiled = "padded torch.compile, ragged" if ragged else "torch.compile"
    against = {COMPILED_WHOLE: compiled, ITEM_LOOP: "the item loop"}.get(str(record["baseline"]), "")
    return f"{what} over {against}, B {rows}"


def conditional_records(bench: Bench) -> Iterator[Record]:
    """The same loop behind IF nodes and as a plain graph, whose kernels return at once when nothing is left to do.

    Raises:
        models.NotMeasuredError: the extension lacks the nodes, or a graph can't hold the model.
    """
    if not graphs.has_conditional_nodes():
        raise models.NotMeasuredError("the extension has no graphs with IF nodes")
    dtype = bench.dtypes[0]
    subject = models.subject(SUBJECT, dtype)
    with torch.inference_mode():
        for rows in bench.batches:
            (batch,) = Fixed(rows, bench.length).build(subject).batches
            trace = subject.model.trace(**batch)
            for exits in (NEVER, half_of(rows)):
                subject.model.set_criterion(rule_for(exits, trace, trained=False))
                yield from _conditional(bench, subject, batch, f"{exits}, {Fixed(rows, bench.length).name}")
            subject.model.set_criterion(None)


def _conditional(bench: Bench, subject: models.Subject, batch: dict[str, torch.Tensor], case: str) -> Iterator[Record]:
    parts, (rows, length) = subject.model.parts, batch["input_ids"].shape
    if reason := why_not_resident(parts, subject.model.dtype):
        raise models.NotMeasuredError(reason)
    bucket, stream = bucket_of(rows, length), torch.cuda.Stream()
    captured = graphs.capture(parts, bucket, "cpp", stream)
    loop = ResidentLoop(parts, bucket, bench.encoder, bench.exits)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        loop.launch()
        stream.synchronize()
        plain = graphs._plain(loop, stream)
    ways = {"IF nodes": (captured.loop, captured.replay), "plain graph": (loop, plain)}
    answers = {}
    for name, (own, replay) in ways.items():
        own.load(batch["input_ids"], batch["attention_mask"], None, None)
        replay()
        answers[name] = own.answers[:rows].clone(), own.exit_layer[:rows].clone()
    record = head(CONDITIONAL, case, "IF nodes", shape=str(bucket), dtype=subject.dtype, backend=bench.exits)
    if not all(torch.equal(a, b) for a, b in zip(*answers.values(), strict=True)):
        yield record | {"refused": "the two graphs answer differently"}
        return
    times = bench.times({name: replay for name, (_, replay) in ways.items()})
    yield record | middle(times["IF nodes"]) | beside(times["IF nodes"], times["plain graph"], "plain graph")


def fastest_records(bench: Bench) -> Iterator[Record]:
    """The eager engine beside the graph engine by the size of the batch, and the table of `engine_choice` to paste."""
    measured: dict[int, list[float]] = {}
    dtype = bench.dtypes[0]
    for rows, length in bench.shapes:
        case = Case(
            SUBJECT, Fixed(rows, length), (NEVER, half_of(rows)), dtypes=(dtype,), engines=(FAMILY_LAYERS, GRAPH)
        )
        medians: dict[str, dict[str, float]] = {}
        with torch.inference_mode():
            for record in measure.case_records(FASTEST, case, 0, rounds=min(FEW_ROUNDS, bench.rounds), warmup=2):
                yield record
                if record["engine"] in case.engines and "median_ms" in record:
                    medians.setdefault(record["exits"], {})[record["engine"]] = record["median_ms"]
        ratios = [both[GRAPH] / both[FAMILY_LAYERS] for both in medians.values() if len(both) == 2]
        if ratios:
            measured.setdefault(rows * length, []).append(math.exp(sum(map(math.log, ratios)) / len(ratios)))
    if measured:
        entry = fastest_entry({tokens: max(ratios) for tokens, ratios in measured.items()})
        yield head(FASTEST, "entry of engine_choice.FASTEST", "", dtype=dtype) | {"entry": entry}


def fastest_entry(ratios: Mapping[int, float]) -> list[tuple[int, str]]:
    """Graph over eager by padded tokens -> up to how many tokens which engine is the faster one, ascending."""
    entry: list[tuple[int, str]] = []
    for tokens in sorted(ratios):
        engine = "graph" if ratios[tokens] < 1 else "eager"
        if entry and entry[-1][1] == engine:
            entry.pop()
        entry.append((tokens, engine))
    return entry


#: Name of a section -> its case.
CASES: dict[str, tuple[int, str, bool]] = {
    f"{'ragged' if ragged else 'whole'}_{dtype}_{rows}": (rows, dtype, ragged)
    for dtype in ("float16", "bfloat16")
    for ragged, batches in ((False, (1, 32, 128)), (True, (32, 128)))
    for rows in batches
}


def section(name: str) -> Callable[[Bench], Iterator[Record]]:
    """The records of one of `CASES`."""
    rows, dtype, ragged = CASES[name]
    return lambda bench: whole_records(bench, f"gpu_{name}", rows=rows, dtype=dtype, ragged=ragged)
