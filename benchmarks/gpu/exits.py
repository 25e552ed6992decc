"""The exit of the graph engine: its launches, its time beside what one writes in torch, and a mean beside its bytes.

One timing runs an exit on many copies of a batch, each with hidden states of its own, and the cache is flushed before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.end_to_end.models import DTYPES
from benchmarks.gpu.bench import Bench, Call, Record, beside, head, middle
from benchmarks.gpu.calls import calls_of, launches, miscounted
from benchmarks.gpu.goals import line
from benchmarks.micro.decisions import (
    CLASSES,
    DEPTH,
    LAYER,
    even_offsets,
    head_giving,
    middle_settings,
    nbytes,
    on_device,
    random_trace,
)
from benchmarks.micro.plain_rules import entropy_of
from earlyexit_kernels.engine.resident import TILE
from earlyexit_kernels.ops import RESIDENT_EXITS

STEP, MEAN = "gpu_exit_step", "gpu_mean_pooling"
CHAIN, COMPILED, COPY = "torch chain", "compiled chain", "copy of as many bytes"
#: Rows of the trace that the setting is laid out over, so that it is the same for every batch.
SETTING_ROWS = 256
#: Largest difference of an answer. The chain rounds its logits to the dtype, so rows near the threshold may turn.
TOLERANCE, CHAIN_TOLERANCE = 1e-4, 3e-2
#: Bytes of the copy that tells the bandwidth, far more than the cache holds.
LARGE_COPY = 2**30


class Exit:
    """The entropy exit after a middle layer of one batch, on copies.

    Args:
        bench: where.
        rows, dtype, pooling: of the batch.
    """

    def __init__(self, bench: Bench, rows: int, dtype: str, pooling: str) -> None:
        self.bench, self.pooling = bench, pooling
        self.rule = middle_settings(random_trace(SETTING_ROWS))["entropy"]
        logits = on_device(random_trace(rows), bench.device).logits[:, LAYER - 1]
        found = head_giving(logits, bench.width, bench.length, pooling)
        kind = DTYPES[dtype]
        self.weight, self.bias = found.weight.to(kind), found.bias.to(kind)
        tokens = rows * bench.length
        one_side = found.hidden.to(kind)
        self.hidden = [torch.cat((one_side, torch.zeros_like(one_side))) for _ in range(bench.copies)]
        self.capacity, self.padded = tokens, one_side.view(rows, bench.length, bench.width)
        offsets, device = even_offsets(rows, bench.length, bench.device), bench.device
        before = {
            "row_ids": bench.ints(range(rows)),
            "offsets": offsets,
            "old_offsets": torch.zeros_like(offsets),
            "source": bench.ints([0] * rows),
            "counts": bench.ints([0] * 4),
            "state": self.rule.new_state(rows, torch.device(device), CLASSES),
            "answers": torch.zeros(rows, CLASSES, device=device),
            "exit_layer": torch.zeros(rows, dtype=torch.int64, device=device),
        }
        self.before = before
        self.copies = [{name: x.clone() for name, x in before.items()} for _ in range(bench.copies)]

    def restore(self) -> None:
        """Put what the exits change back."""
        for copy in self.copies:
            for name, x in copy.items():
                x.copy_(self.before[name])

    def decide(self, number: int, backend: str) -> None:
        """The exit, on one of the copies."""
        x, rule = self.copies[number], self.rule
        RESIDENT_EXITS[backend](
            self.hidden[number], self.weight, self.bias, None, None, x["row_ids"], x["offsets"], x["old_offsets"],
            x["source"], x["counts"], x["state"], x["answers"], x["exit_layer"], rule.name, rule.params(LAYER),
            self.pooling, LAYER, DEPTH, TILE, self.capacity, 0,
        )  # fmt: skip

    def calls(self, backend: str) -> list[Call]:
        """The exit on each of the copies."""
        return [functools.partial(self.decide, number, backend) for number in range(len(self.copies))]

    def difference(self) -> str:
        """What of the last copy isn't the reference's, empty where nothing is."""
        self.restore()
        self.decide(0, "torch")
        self.decide(-1, self.bench.exits)
        want, got = self.copies[0], self.copies[-1]
        moved = [name for name in want if want[name].dtype != torch.float32 and not torch.equal(want[name], got[name])]
        if moved:
            return f"{', '.join(moved)} are others than in torch"
        off = float((want["answers"] - got["answers"]).abs().max())
        return "" if off <= TOLERANCE else f"answers are {off:.2g} off those of torch"

    def chain(self) -> Callable[..., Any]:
        """The same without the package, as one writes it on padded rows; no row moves."""
        threshold = self.rule.params(LAYER)[0]
        first = self.pooling == "first"

        def chain(
            padded: Tensor, weight: Tensor, bias: Tensor, done: Tensor, answers: Tensor, exit_layer: Tensor
        ) -> tuple[Tensor, ...]:
            z = F.linear(padded[:, 0] if first else padded.mean(dim=1), weight, bias).float()
            leaves = (entropy_of(z) < threshold) & ~done
            done = done | leaves
            answers, exit_layer = torch.where(leaves[:, None], z, answers), torch.where(leaves, LAYER, exit_layer)
            return done, answers, exit_layer, (~done).sum()

        return chain

    def chain_calls(self, chain: Callable[..., Any]) -> list[Call]:
        """A chain on each of the copies."""
        rows, width = self.padded.shape[0], self.padded.shape[2]
        padded = [x[: self.capacity].view(rows, -1, width) for x in self.hidden]
        done = torch.zeros(rows, dtype=torch.bool, device=self.bench.device)
        rest = (self.weight, self.bias, done, self.before["answers"], self.before["exit_layer"])
        return [functools.partial(chain, x, *rest) for x in padded]

    def chain_difference(self, call: Call) -> str:
        """What is wrong with a chain's answers; a row within rounding of the threshold may go either way."""
        self.restore()
        self.decide(0, "torch")
        want, (_, answers, exit_layer, _) = self.copies[0], call()
        both = (want["exit_layer"] > 0) & (exit_layer > 0)
        turned = int(((want["exit_layer"] > 0) != (exit_layer > 0)).sum())
        off = float((want["answers"] - answers)[both].abs().max()) if bool(both.any()) else 0.0
        if turned > max(1, len(both) // 16):
            return f"{turned} of {len(both)} rows decide otherwise"
        return "" if off <= CHAIN_TOLERANCE else f"answers are {off:.2g} off"

    @property
    def bytes(self) -> int:
        """What one exit has to move: hidden states that it pools, weights, and what it keeps of the rows."""
        pooled = self.padded if self.pooling == "mean" else self.padded[:, 0]
        return nbytes(pooled, self.weight, self.bias, *self.before.values())


def step_records(bench: Bench) -> Iterator[Record]:
    """Launches and times of the exit on first tokens."""
    for dtype in bench.dtypes:
        for rows in bench.batches:
            yield from _step(bench, Exit(bench, rows, dtype, "first"), rows, dtype)


def _step(bench: Bench, exit_: Exit, rows: int, dtype: str) -> Iterator[Record]:
    fields = {"shape": f"B {rows}, S {bench.length}, H {bench.width}", "dtype": dtype}
    torch._dynamo.reset()
    chains = {CHAIN: exit_.chain(), COMPILED: torch.compile(exit_.chain(), dynamic=False)}
    each = {name: exit_.chain_calls(chain) for name, chain in chains.items()}
    wrong = exit_.difference()
    if wrong:
        yield head(STEP, "exit step", "exit", backend=bench.exits, **fields) | {"refused": wrong}
        return
    for name, calls in list(each.items()):
        if wrong := exit_.chain_difference(calls[0]):
            yield head(STEP, "exit step", name, **fields) | {"refused": wrong}
            del each[name]
    ours = exit_.calls(bench.exits)
    exit_.restore()
    counting = head(STEP, "launches", "exit", backend=bench.exits, **fields)
    if wrong := miscounted(bench.device):
        yield counting | {"not_measured": wrong}
    else:
        yield _with_line(counting | {"launches": launches(calls_of(ours[0]))}, "exit step: launches")
    graphs = {name: bench.graph_of(calls) for name, calls in {"exit": ours, **each}.items()}
    # by the host a chain takes its turns alone; the exit stays in its graph, since that is where it lives
    by_host = {name: _in_turn(calls) for name, calls in each.items()} | {"exit": graphs["exit"]}
    for case, ways, bars in (
        ("in graphs", graphs, "exit step over the {}, both in graphs"),
        ("launched by the host", by_host, "exit step in a graph over the {}, launched by the host"),
    ):
        times = bench.times(ways, restore=exit_.restore, by_host=ways is by_host)
        own = head(STEP, case, "exit", backend=bench.exits, **fields) | middle(times["exit"], bench.copies)
        yield own if by_host is ways else _with_line(own, "exit step: microseconds in a graph")
        for name in each:
            yield head(STEP, case, name, **fields) | middle(times[name], bench.copies)
            yield _with_line(own | beside(times["exit"], times[name], name), bars.format(name))


def _in_turn(calls: list[Call]) -> Call:
    def run() -> None:
        for call in calls:
            call()

    return run


def _with_line(record: Record, bar: str) -> Record:
    return record | line(bar, record)


def mean_records(bench: Bench) -> Iterator[Record]:
    """The exit on the mean of each row's tokens, beside the time that reading them takes at the best bandwidth seen."""
    source, target = (torch.ones(LARGE_COPY, dtype=torch.int8, device=bench.device) for _ in range(2))
    for dtype in bench.dtypes:
        for rows in bench.batches:
            exit_ = Exit(bench, rows, dtype, "mean")
            fields = {"shape": f"B {rows}, S {bench.length}, H {bench.width}", "dtype": dtype}
            own = head(MEAN, "mean pooling", "exit", backend=bench.exits, **fields)
            if wrong := exit_.difference():
                yield own | {"refused": wrong}
                continue
            ways = {"exit": bench.graph_of(exit_.calls(bench.exits)), COPY: lambda: target.copy_(source)}
            times = bench.times(ways, restore=exit_.restore)
            # the time of the exit's bytes at the speed of the large copy, round by round
            share = exit_.bytes * bench.copies / (2 * source.numel())
            record = own | middle(times["exit"], bench.copies)
            record |= beside(times["exit"], [share * t for t in times[COPY]], COPY)
            moved = {"moved_bytes": exit_.bytes, "copied_gb_per_s": round(2e-6 * source.numel() / min(times[COPY]), 1)}
            record |= moved
            yield record | line(f"mean pooling over the time of its bytes, B {rows}", record)
