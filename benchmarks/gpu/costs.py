"""What a pass costs beside its kernels: waits of the host, captures, and the self-tests of the back-ends."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.end_to_end import models
from benchmarks.end_to_end.forced import rule_for
from benchmarks.end_to_end.models import (
    CALLS_TO_CAPTURE,
    CAPTURED_LAYERS,
    FAMILY_LAYERS,
    Model,
    engine_model,
    refused_captures,
)
from benchmarks.end_to_end.suites import HALF
from benchmarks.end_to_end.workloads import Fixed, padded
from benchmarks.goals import gpu_goal
from benchmarks.gpu.bench import SUBJECT, Bench, header
from benchmarks.gpu.calls import calls_of, event_waits, launches, miscounted, synchronisations
from benchmarks.harness import Record, time_fields
from benchmarks.machine import device
from earlyexit_kernels.backends import available_backends
from earlyexit_kernels.ops import self_test

SUITE = "gpu_costs"
SELF_TESTS = 10


def records(bench: Bench) -> Iterator[Record]:
    """Yield self-tests first, whose first time includes what is compiled."""
    yield from self_test_records(bench)
    yield from sync_records(bench)
    yield from level_records(bench)


def sync_records(bench: Bench) -> Iterator[Record]:
    """Yield how often the host waits for the device per batch, with and without a mask, and torch's debug message."""
    if wrong := miscounted(bench.device):
        yield header(SUITE, "host synchronisations", "profiler") | {"not_measured": wrong}
        return
    dtype, rows = bench.dtypes[0], bench.batches[len(bench.batches) // 2]
    for engine in (CAPTURED_LAYERS, FAMILY_LAYERS):
        model, batch = leaving_model(bench, engine, dtype, rows)
        for mask, inputs in (("with a mask", batch), ("without a mask", {"input_ids": batch["input_ids"]})):
            shape = f"{Fixed(rows, bench.length).name}, {mask}"
            record = header(
                SUITE, "host synchronisations", engine, shape=shape, dtype=dtype, backend=model.explain().backend
            )
            run = _run(model, inputs)
            for _ in range(CALLS_TO_CAPTURE):
                run()
            counted = calls_of(run)
            record |= {"syncs": synchronisations(counted), "event_waits": event_waits(counted)}
            record |= {"launches": launches(counted), "debug_mode": in_debug_mode(run)}
            yield record | (gpu_goal("host synchronisations a batch", record) if engine == CAPTURED_LAYERS else {})


def in_debug_mode(run: Callable[[], Any]) -> str:
    """Return torch's message if a call synchronises, else an empty string."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def leaving_model(bench: Bench, engine: str, dtype: str, rows: int) -> tuple[Model, dict[str, Tensor]]:
    """Return a model whose rows leave at many layers, and a batch."""
    subject = models.subject(SUBJECT, dtype)
    (batch,) = Fixed(rows, bench.length).build(subject).batches
    model = engine_model(subject, engine)
    with torch.inference_mode():
        model.set_criterion(rule_for(HALF, subject.model.trace(**batch), trained=False))
    return model, batch


def _run(model: Model, batch: dict[str, Tensor]) -> Callable[[], Any]:
    def run() -> Any:
        with torch.inference_mode():
            return model(**batch)

    return run


def level_records(bench: Bench) -> Iterator[Record]:
    """Yield how long captures take, how many a mix of batch sizes needs, and the memory of their buffers and pool."""
    dtype, largest = bench.dtypes[0], max(bench.batches)
    model, _ = leaving_model(bench, CAPTURED_LAYERS, dtype, largest)
    model.refresh()
    record = header(SUITE, "captures of batches of random sizes", CAPTURED_LAYERS, dtype=dtype)
    record["shape"] = f"{bench.mixed} batches, B 1 to {largest}, S 2 to {bench.length}"
    captured, seconds = model.runner.paths["captured"].layers, []
    recorder = captured.recorder(model.device)
    capture = recorder.record

    def timed(run: Callable[[], Any]) -> Any:
        torch.cuda.synchronize()
        start = time.perf_counter()
        made = capture(run)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        return made

    recorder.record = timed  # type: ignore[method-assign]
    before = _reserved()
    for batch in _mixed_batches(bench, largest, models.subject(SUBJECT, dtype).vocabulary):
        _run(model, batch)()
    if reason := refused_captures(model):
        yield record | {"refused": reason}
        return
    record |= time_fields([1000 * second for second in seconds]) if seconds else {}
    levels = len(captured._levels)
    yield record | {
        "captures": len(seconds),
        "seconds": round(sum(seconds), 3),
        "levels": levels,
        "mib": round((_reserved() - before) / 2**20, 1),
    }


def _mixed_batches(bench: Bench, largest: int, vocabulary: int) -> Iterator[dict[str, Tensor]]:
    draw, generator = random.Random(0), torch.Generator().manual_seed(0)
    for _ in range(bench.mixed):
        longest = draw.randint(2, bench.length)
        lengths = [draw.randint(2, longest) for _ in range(draw.randint(1, largest))]
        yield padded([torch.randint(1, vocabulary, (n,), generator=generator).to(device()) for n in lengths])


def _reserved() -> int:
    """Return the bytes that torch holds on the device, without those that it could give back."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def self_test_records(bench: Bench) -> Iterator[Record]:
    """Yield how long the self-test of each back-end takes, the first time and again."""
    reasons = available_backends(bench.device)
    place = torch.device(bench.device, 0 if bench.device == "cuda" else None)
    for backend in ("cpp", "triton"):
        record = header(SUITE, "self-test", backend, backend=backend)
        if reasons[backend]:
            yield record | {"not_measured": reasons[backend]}
            continue
        times = []
        for _ in range(1 + SELF_TESTS):
            start = time.perf_counter()
            failure = self_test._failure(backend, place)
            times.append(1000 * (time.perf_counter() - start))
        if failure:
            yield record | {"refused": failure}
            continue
        record |= time_fields(times[1:]) | {"first_ms": round(times[0], 3)}
        yield record | gpu_goal(f"self-test of {backend}, milliseconds", record)
