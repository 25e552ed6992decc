"""The kernels of one pass of the resident loop, launched by the host: microseconds by name, from a profile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.end_to_end import models
from benchmarks.end_to_end.forced import NEVER, rule_for
from benchmarks.end_to_end.workloads import Fixed
from benchmarks.gpu.bench import Bench, header
from benchmarks.gpu.whole import SUBJECT, half_of
from benchmarks.harness import Record
from benchmarks.machine import NotMeasuredError
from earlyexit_kernels.engine.graphs import bucket_of
from earlyexit_kernels.engine.inputs import Inputs
from earlyexit_kernels.engine.resident import ResidentLoop, resident_unsupported_reason

SUITE = "gpu_kernels"
#: Passes before the profile: Triton compiles in the first.
WARM_UPS = 3
#: Characters of a kernel's name, which may hold the types of a template.
NAME_LENGTH = 80


class Kernel(NamedTuple):
    """The launches of a kernel in a profile, and their microseconds together."""

    name: str
    launches: int
    microseconds: float


def records(bench: Bench) -> Iterator[Record]:
    """Yield each kernel of a pass without a graph, the slowest first, where no row leaves and at mean depth 6.

    Raises:
        NotMeasuredError: the loop does not support the model.
    """
    subject = models.subject(SUBJECT, bench.dtypes[0])
    for rows in bench.batches:
        (batch,) = Fixed(rows, bench.length).build(subject).batches
        with torch.inference_mode():
            trace = subject.model.trace(**batch)
        for exits in (NEVER, half_of(rows)):
            subject.model.set_criterion(rule_for(exits, trace, trained=False))
            yield from _pass(bench, subject, batch, exits)
        subject.model.set_criterion(None)


def _pass(bench: Bench, subject: models.Subject, batch: dict[str, torch.Tensor], exits: str) -> Iterator[Record]:
    view, (rows, length) = subject.model.view(), batch["input_ids"].shape
    if reason := resident_unsupported_reason(view, subject.model.dtype):
        raise NotMeasuredError(reason)
    bucket = bucket_of(rows, length)
    loop = ResidentLoop(view, bucket, bench.encoder, bench.exits)
    loop.load(Inputs(batch["input_ids"], batch["attention_mask"]))
    for _ in range(WARM_UPS):
        loop.launch()
    found = sorted(kernels_of(loop.launch), key=lambda kernel: -kernel.microseconds)
    for kernel in found:
        named = header(SUITE, f"B {rows}, {exits}", kernel.name[:NAME_LENGTH], shape=str(bucket), dtype=subject.dtype)
        yield named | {"launches": kernel.launches, "microseconds": round(kernel.microseconds, 2)}


def kernels_of(run: Callable[[], Any]) -> list[Kernel]:
    """Return the kernels, copies and fills that a call puts on the device."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    return [
        Kernel(event.key, event.count, float(event.self_device_time_total))
        for event in profiled.key_averages()
        if event.self_device_time_total > 0
    ]
