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
from benchmarks.machine import DTYPES, distance
from benchmarks.micro.decisions import (
    CLASSES,
    DEPTH,
    LAYER,
    even_offsets,
    head_giving,
    middle_settings,
    random_trace,
)
from benchmarks.micro.plain import SOURCES, chain_of
from earlyexit_kernels.ops import raw
from earlyexit_kernels.ops.exit_call import ExitCall

SUITE = "gpu_exit_step"
EXIT, CHAIN, COMPILED, COPY = "exit", "torch chain", "compiled chain", "copy of as many bytes"
#: Rows of the trace that the threshold is chosen on, so that it is the same for every batch.
SETTING_ROWS = 256
#: Largest difference of an answer. The chain rounds its logits to the dtype, so rows near the threshold may change.
TOLERANCE, CHAIN_TOLERANCE = 1e-4, 3e-2
#: Bytes of the copy that measures the bandwidth, far more than the cache holds.
LARGE_COPY = 2**30


class Exit:
    """The entropy exit after a middle layer of one batch, on copies."""

    def __init__(self, bench: Bench, rows: int, dtype: str, pooling: str) -> None:
        self.bench, self.pooling, device = bench, pooling, bench.device
        self.rule = middle_settings(random_trace(SETTING_ROWS))["entropy"]
        logits = random_trace(rows, device=device).logits[:, LAYER - 1]
        made = head_giving(logits, bench.width, bench.length, pooling)
        kind = DTYPES[dtype]
        self.weight, self.bias, hidden = made.weight.to(kind), made.bias.to(kind), made.hidden.to(kind)
        self.hidden = [hidden.clone() for _ in range(bench.copies)]
        self.padded = hidden.view(rows, bench.length, bench.width)
        self.offsets = even_offsets(rows, bench.length, device)
        self.before = {
            "row_ids": torch.arange(rows, dtype=torch.int32, device=device),
            "state": self.rule.new_state(rows, torch.device(device), CLASSES),
            "answers": torch.zeros(rows, CLASSES, device=device),
            "exit_layer": torch.zeros(rows, dtype=torch.int64, device=device),
        }
        self.copies = [{name: x.clone() for name, x in self.before.items()} for _ in range(bench.copies)]

    def restore(self) -> None:
        """Restore what the exits change."""
        for copy in self.copies:
            for name, x in copy.items():
                x.copy_(self.before[name])

    def decide(self, number: int, backend: str) -> None:
        """Run the exit on one of the copies."""
        tensors = self.hidden[number], self.offsets, self.weight, self.bias, None, None, *self.copies[number].values()
        call = ExitCall(*tensors, self.rule.name, self.rule.params(LAYER), self.pooling, LAYER, DEPTH)
        raw("exit_step", backend, self.bench.device)(*call)

    def calls(self, backend: str) -> list[Call]:
        """Return the exit on each of the copies."""
        return [functools.partial(self.decide, number, backend) for number in range(len(self.copies))]

    def check(self) -> Checked:
        """Compare the last copy with the torch reference."""
        self.restore()
        self.decide(0, "torch")
        self.decide(-1, self.bench.backend)
        want, got = self.copies[0], self.copies[-1]
        moved = [name for name in want if want[name].dtype != torch.float32 and not torch.equal(want[name], got[name])]
        if moved:
            return Checked(f"{', '.join(moved)} differ from the torch reference")
        off = distance(want["answers"], got["answers"])
        return Checked("" if off <= TOLERANCE else f"answers are {off:.2g} off the torch reference")

    def chain(self) -> Callable[..., Any]:
        """Return the same in plain torch on padded rows, without the package."""
        source = SOURCES[self.pooling]
        return chain_of(self.rule, lambda *inputs: source(*inputs).float())

    def chain_calls(self, chain: Callable[..., Any]) -> list[Call]:
        """Return a chain on each of the copies."""
        padded = [x.view(self.padded.shape) for x in self.hidden]
        done = torch.zeros(len(self.padded), dtype=torch.bool, device=self.bench.device)
        first = (done, self.before["answers"], self.before["exit_layer"])
        return [functools.partial(chain, *first, x, self.weight, self.bias) for x in padded]

    def check_chain(self, call: Call) -> Checked:
        """Compare a chain's answers; a row within rounding of the threshold may go either way."""
        self.restore()
        self.decide(0, "torch")
        want, (_, answers, exit_layer, _) = self.copies[0], call()
        both = (want["exit_layer"] > 0) & (exit_layer > 0)
        turned = int(((want["exit_layer"] > 0) != (exit_layer > 0)).sum())
        if turned > max(1, len(both) // 16):
            return Checked(f"{turned} of {len(both)} rows decide otherwise")
        off = distance(want["answers"][both], answers[both]) if bool(both.any()) else 0.0
        return Checked("" if off <= CHAIN_TOLERANCE else f"answers are {off:.2g} off")

    @property
    def bytes(self) -> int:
        """Bytes that one exit has to move: hidden states that it pools, weights, and its buffers."""
        pooled = self.padded if self.pooling == "mean" else self.padded[:, 0]
        parts = (pooled, self.weight, self.bias, self.offsets, *self.before.values())
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
    chains = {CHAIN: exit_.chain(), COMPILED: torch.compile(exit_.chain(), dynamic=False)}
    each = {EXIT: exit_.calls(bench.backend)} | {name: exit_.chain_calls(chain) for name, chain in chains.items()}
    checks = {name: functools.partial(exit_.check_chain, each[name][0]) for name in chains} | {EXIT: exit_.check}
    prepared = harness.prepare(
        (Variant(name), functools.partial(Implementation, Variant(name), _in_turn(each[name]), checks[name]))
        for name in each
    )
    yield from prepared.skipped_records(lambda variant: named("first token", variant.engine))
    ready = [variant.engine for variant in prepared.ready]
    if EXIT not in ready:
        return
    exit_.restore()
    counting = named("launches", EXIT)
    if wrong := miscounted(bench.device):
        yield counting | {"not_measured": wrong}
    else:
        yield _with_goal(counting | {"launches": launches(calls_of(each[EXIT][0]))}, "exit step: launches")
    on_device = bench.times({EXIT: _in_turn(each[EXIT])}, restore=exit_.restore)
    own = named("first token, on the device", EXIT) | micros(on_device[EXIT], bench.copies)
    yield _with_goal(own, "exit step: microseconds on the device")
    times = bench.times({name: _in_turn(each[name]) for name in ready}, restore=exit_.restore, by_host=True)
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
    calls = {EXIT: _in_turn(exit_.calls(bench.backend)), COPY: lambda: target.copy_(source)}
    times = bench.times(calls, restore=exit_.restore)
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
