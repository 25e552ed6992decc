"""The exit: its launches, its time beside torch's, and beside the bytes that it reads.

One timing runs an exit on many copies of a batch, each with its own hidden states; the cache is flushed before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks import harness
from benchmarks.goals import gpu_goal
from benchmarks.gpu.bench import Bench, header, micros, over
from benchmarks.gpu.calls import calls_of, launches, miscounted
from benchmarks.harness import Call, Checked, Implementation, Record, Variant
from benchmarks.machine import DTYPES
from benchmarks.micro.decisions import LAYER, Decision, head_giving, middle_settings, random_trace
from benchmarks.micro.plain import PlainDecision

SUITE = "gpu_exit_step"
EXIT, CHAIN, COMPILED, COPY = "exit", "torch chain", "compiled chain", "copy of as many bytes"
#: Rows of the trace that the threshold is chosen on, so that it is the same for every batch.
SETTING_ROWS = 256
#: The chain rounds its logits to the dtype, so rows near the threshold may change.
CHAIN_TOLERANCE, CHAIN_TURNS = 3e-2, 16
#: Bytes of the copy that measures the bandwidth, far more than the cache holds.
LARGE_COPY = 2**30


class Exit:
    """The entropy exit after a middle layer of one batch, on copies, and the same in plain torch on padded rows."""

    def __init__(self, bench: Bench, rows: int, dtype: str, pooling: str) -> None:
        rule, kind = middle_settings(random_trace(SETTING_ROWS))["entropy"], DTYPES[dtype]
        trace = random_trace(rows, device=bench.device)
        head = head_giving(trace.logits[:, LAYER - 1], bench.width, bench.length, pooling)
        head = head._replace(hidden=head.hidden.to(kind), weight=head.weight.to(kind), bias=head.bias.to(kind))
        self.head, self.padded = head, head.hidden.view(rows, bench.length, bench.width)
        self.ours = Decision(rule, trace, bench.backend, bench.copies, head, apart=True)
        exits = [trace.logits[:, k] for k in range(LAYER)]
        self.plain = PlainDecision(rule, exits, pooling, (self.padded, head.weight, head.bias))

    def calls(self) -> list[Call]:
        """Return the exit on each of the copies."""
        return [functools.partial(self.ours.once, number) for number in range(len(self.ours.copies))]

    def chain_calls(self, chain: Callable[..., Any]) -> list[Call]:
        """Return the plain chain, perhaps compiled, on each of the copies."""
        rest = self.plain.inputs[1:]
        hidden = [inputs[0].view(self.padded.shape) for inputs in self.ours.inputs]
        return [functools.partial(chain, *self.plain.start, padded, *rest) for padded in hidden]

    def check(self) -> Checked:
        """Compare the last copy with the plain chain in float64."""
        self.ours.restore()
        live = int(self.ours.once(-1)[0])
        row_ids, _, answers, _ = self.ours.copies[-1]
        return self.plain.check(row_ids < 0, live, answers)

    def check_chain(self, call: Call) -> Checked:
        """Compare a chain with itself in float64."""
        done, answers, _, live = call()
        return self.plain.check(done, int(live), answers, tolerance=CHAIN_TOLERANCE, turns=CHAIN_TURNS)

    @property
    def bytes(self) -> int:
        """Bytes that one exit has to move: hidden states that it pools, weights, and its buffers."""
        pooled = self.padded if self.head.pooling == "mean" else self.padded[:, 0]
        parts = (pooled, self.head.weight, self.head.bias, self.head.offsets, *self.ours.before)
        return sum(x.numel() * x.element_size() for x in parts)


def records(bench: Bench) -> Iterator[Record]:
    """Yield launches and times of the exit on first tokens, and its time on means beside that of their bytes."""
    for dtype in bench.dtypes:
        for rows in bench.batches:
            yield from _first(bench, Exit(bench, rows, dtype, "first"), rows, dtype)
            yield from _mean(bench, Exit(bench, rows, dtype, "mean"), rows, dtype)


def _named(bench: Bench, case: str, name: str, rows: int, dtype: str) -> Record:
    shape = f"B {rows}, S {bench.length}, H {bench.width}"
    return header(SUITE, case, name, shape=shape, dtype=dtype, backend=bench.backend if name == EXIT else "")


def _first(bench: Bench, exit_: Exit, rows: int, dtype: str) -> Iterator[Record]:
    named = functools.partial(_named, bench, rows=rows, dtype=dtype)
    torch._dynamo.reset()
    chain = exit_.plain.chain
    calls = {EXIT: exit_.calls(), CHAIN: exit_.chain_calls(chain)}
    calls[COMPILED] = exit_.chain_calls(torch.compile(chain, dynamic=False))
    checks = {name: functools.partial(exit_.check_chain, calls[name][0]) for name in calls} | {EXIT: exit_.check}
    prepared = harness.prepare(
        (Variant(name), functools.partial(Implementation, Variant(name), _in_turn(calls[name]), checks[name]))
        for name in calls
    )
    yield from prepared.skipped_records(lambda variant: named("first token", variant.engine))
    ready = [variant.engine for variant in prepared.ready]
    if EXIT not in ready:
        return
    exit_.ours.restore()
    counting = named("launches", EXIT)
    if wrong := miscounted(bench.device):
        yield counting | {"not_measured": wrong}
    else:
        yield _with_goal(counting | {"launches": launches(calls_of(calls[EXIT][0]))}, "exit step: launches")
    on_device = bench.times({EXIT: _in_turn(calls[EXIT])}, restore=exit_.ours.restore)
    ours = named("first token, on the device", EXIT) | micros(on_device[EXIT], bench.copies)
    yield _with_goal(ours, "exit step: microseconds on the device")
    times = bench.times({name: _in_turn(calls[name]) for name in ready}, restore=exit_.ours.restore, by_host=True)
    for name in ready:
        yield named("first token, launched by the host", name) | micros(times[name], bench.copies)
        if name != EXIT:
            compared = micros(times[EXIT], bench.copies) | over(times[EXIT], times[name], name)
            yield _with_goal(named("first token, launched by the host", EXIT) | compared, f"exit step over the {name}")


def _mean(bench: Bench, exit_: Exit, rows: int, dtype: str) -> Iterator[Record]:
    """Yield the time of the exit on means over that of its bytes, at the speed of a large copy in the same round."""
    record = _named(bench, "mean, on the device", EXIT, rows, dtype)
    if wrong := exit_.check().wrong:
        yield record | {"refused": wrong}
        return
    source, target = (torch.ones(LARGE_COPY, dtype=torch.int8, device=bench.device) for _ in range(2))
    calls = {EXIT: _in_turn(exit_.calls()), COPY: lambda: target.copy_(source)}
    times = bench.times(calls, restore=exit_.ours.restore)
    share = exit_.bytes * bench.copies / (2 * source.numel())
    record |= micros(times[EXIT], bench.copies) | over(times[EXIT], [share * t for t in times[COPY]], COPY)
    record |= {"moved_bytes": exit_.bytes, "copied_gb_per_s": round(2e-6 * source.numel() / min(times[COPY]), 1)}
    yield _with_goal(record, f"exit step on the mean over the time of its bytes, B {rows}")


def _in_turn(calls: list[Call]) -> Call:
    def run() -> None:
        for call in calls:
            call()

    return run


def _with_goal(record: Record, name: str) -> Record:
    return record | gpu_goal(name, record)
