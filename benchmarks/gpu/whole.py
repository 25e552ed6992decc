"""Whole models in BERT-base's shape: the graph engine beside the stock model, which is compiled into CUDA graphs.

Answers are checked, variants timed and records made as in `benchmarks.end_to_end`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping

import torch

from benchmarks.end_to_end import measure, models
from benchmarks.end_to_end.baselines import COMPILED_CAPTURED, COMPILED_WHOLE, ITEM_LOOP, PLAIN
from benchmarks.end_to_end.engines import FAMILY_LAYERS, GRAPH
from benchmarks.end_to_end.forced import NEVER, rule_for
from benchmarks.end_to_end.suites import HALF, ONE_AT_HALF
from benchmarks.end_to_end.variants import Case
from benchmarks.end_to_end.workloads import DATA_VARIABLE, Fixed, Ragged, Sst2, Work
from benchmarks.goals import gpu_goal
from benchmarks.gpu.bench import Bench, header, micros, over
from benchmarks.harness import Record
from benchmarks.machine import NotMeasuredError
from earlyexit_kernels.engine import capturing, graphs
from earlyexit_kernels.engine.capturing import available_nodes
from earlyexit_kernels.engine.graphs import bucket_of
from earlyexit_kernels.engine.inputs import Inputs
from earlyexit_kernels.engine.resident import ResidentLoop, resident_unsupported_reason

CONDITIONAL, FASTEST = "gpu_conditional", "gpu_fastest"
SUBJECT = "BERT-base"
#: The stock model, compiled, by two ways of running it from CUDA graphs: torch may skip its own.
COMPILED = (COMPILED_WHOLE, COMPILED_CAPTURED)
#: Rounds of a batch in the section ``fastest``.
FEW_ROUNDS = 20


def half_of(rows: int) -> str:
    """Return the mix whose rows run half of the layers."""
    return ONE_AT_HALF if rows == 1 else HALF


def whole_records(bench: Bench, suite: str, *, rows: int, dtype: str, ragged: bool) -> Iterator[Record]:
    """Yield never exit and exits at mean depth 6 of one batch, by the graph and the eager engine and the baselines.

    Args:
        bench: sizes and rounds.
        suite: for the records.
        rows, dtype: of the batch.
        ragged: SST-2's lengths, or generated ones without the data; otherwise all rows are full.
    """
    baselines = (*COMPILED, ITEM_LOOP) if rows == 1 else COMPILED
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
            goal = gpu_goal(_goal_name(record, rows, ragged), record)
            yield {**{k: v for k, v in record.items() if k not in ("goal", "goal_of", "goal_met")}, **goal}


def _ragged(rows: int) -> Work:
    return Sst2(rows, 1) if os.environ.get(DATA_VARIABLE) else Ragged(rows)


def _goal_name(record: Mapping[str, object], rows: int, ragged: bool) -> str:
    """Return the name of a record's goal, which may not exist."""
    if record["engine"] != GRAPH or "ratio" not in record:
        return ""
    what = "never exit" if record["exits"] == NEVER else "mean depth 6"
    compiled = "padded torch.compile, ragged" if ragged else "torch.compile"
    against = {**dict.fromkeys(COMPILED, compiled), ITEM_LOOP: "the item loop"}.get(str(record["baseline"]), "")
    return f"{what} over {against}, B {rows}"


def conditional_records(bench: Bench) -> Iterator[Record]:
    """Yield the time of the loop with IF nodes over that of a plain graph, whose kernels return if no row is live.

    Raises:
        NotMeasuredError: there are no nodes, or a graph does not support the model.
    """
    nodes = available_nodes(bench.exits)
    if nodes.name == "none":
        raise NotMeasuredError(f"no graphs with IF nodes: {nodes.reason}")
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
    parts, (rows, length) = subject.model.view(), batch["input_ids"].shape
    if reason := resident_unsupported_reason(parts, subject.model.dtype):
        raise NotMeasuredError(reason)
    bucket, stream = bucket_of(rows, length), torch.cuda.Stream()
    captured = graphs.capture(parts, bucket, bench.exits, stream)
    loop = ResidentLoop(parts, bucket, bench.encoder, bench.exits)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        loop.launch()
        stream.synchronize()
        plain = capturing.record("none", loop.launch, stream)
    ways = {"IF nodes": (captured.loop, captured.replay), "plain graph": (loop, plain)}
    answers = {}
    for name, (own, replay) in ways.items():
        own.load(Inputs(batch["input_ids"], batch["attention_mask"]))
        replay()
        answers[name] = own.answers[:rows].clone(), own.exit_layer[:rows].clone()
    engine = f"IF nodes of {available_nodes(bench.exits).name}"
    record = header(CONDITIONAL, case, engine, shape=str(bucket), dtype=subject.dtype, backend=bench.exits)
    if not all(torch.equal(a, b) for a, b in zip(*answers.values(), strict=True)):
        yield record | {"refused": "the two graphs answer differently"}
        return
    times = bench.times({name: replay for name, (_, replay) in ways.items()})
    yield record | micros(times["IF nodes"]) | over(times["IF nodes"], times["plain graph"], "plain graph")


def fastest_records(bench: Bench) -> Iterator[Record]:
    """Yield the eager and the graph engine by batch size, and the entry of `choice.FASTEST` to paste."""
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
        yield header(FASTEST, "entry of choice.FASTEST", "", dtype=dtype) | {"entry": entry}


def fastest_entry(ratios: Mapping[int, float]) -> list[tuple[int, str]]:
    """Return (padded tokens, faster engine up to them), ascending, given the graph's time over eager by tokens."""
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
    """Return what yields the records of one of `CASES`."""
    rows, dtype, ragged = CASES[name]
    return lambda bench: whole_records(bench, f"gpu_{name}", rows=rows, dtype=dtype, ragged=ragged)
