"""What all microbenchmarks share: shapes, the ways of doing one piece of work, the roofline, and what a round is.

A group is one piece of work on one input, and the ways of doing it: each back-end, the plain torch chain, that chain
compiled, and a copy of as many bytes as the work has to move. pytest-benchmark times one way after the other, and the
times and statistics of a way are its own. A slow spell of the machine may fall on one way alone, so every round also
runs the plain chain right before or right after the way, as a coin falls, outside of pytest-benchmark's clock. The
ratio of a way is the median over its rounds of its time over that of the chain beside it. The chain too is timed
against itself; what its ratio is off 1 is noise.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.micro.decisions import untimeable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EAGER, COMPILED, COPY = "eager", "compiled", "copy"
#: Back-ends that can be timed here.
TIMED = tuple(backend for backend, why_not in untimeable(DEVICE).items() if not why_not)
#: Values of a shape beside the base point's.
SWEEPS = {"rows": (1, 8, 128, 1024), "classes": (2, 8, 64), "width": (384, 1024)}
#: Calls in one timing on the CPU, as many as move this much, since a single one would drown in the clock's noise.
BYTES_A_TIMING, MOST_CALLS = 2**18, 8
#: Bytes of the copy that tells the bandwidth, far more than a cache holds; copies at a time, and seconds between times.
LARGE_COPY, COPIES, SECONDS_BETWEEN = 2**28, 3, 10.0
#: Seconds that the rounds of one way may take, its untimed runs of the chain included, and rounds it gets at least.
SECONDS, FEWEST_ROUNDS = 0.2, 5
WARM_UP = 2


@dataclass(frozen=True)
class Shape:
    """B rows of S tokens each, C classes, H wide."""

    rows: int = 32
    classes: int = 3
    width: int = 768
    length: int = 32

    def __str__(self) -> str:
        return f"B {self.rows}, C {self.classes}, H {self.width}, S {self.length}"

    @property
    def slug(self) -> str:
        """For names of tests."""
        return str(self).replace(" ", "").replace(",", "-")


BASE = Shape()


def around(*fields: str, most_rows: int = 1024) -> list[Shape]:
    """The base point, and each of some fields at its other values."""
    others = [dataclasses.replace(BASE, **{name: value}) for name in fields for value in SWEEPS[name]]
    return [BASE, *(shape for shape in others if shape.rows <= most_rows)]


@dataclass(frozen=True)
class Way:
    """One way of doing a group's work.

    Attributes:
        call: what is timed.
        difference: does it once and says what of the answer isn't the reference's, ``""`` where nothing is.
        restore: puts back what `call` changes, outside of the clock.
    """

    call: Callable[[], Any]
    difference: Callable[[], str]
    restore: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Group:
    """One piece of work on one input.

    Attributes:
        op, case: what it is.
        shape: of the input.
        moved: bytes that the work has to move, inputs read once and outputs written once.
        calls: of the op in one timing.
        ways: by name.
        facts: more to say of it in the records.
    """

    op: str
    case: str
    shape: Shape
    moved: int
    calls: int
    ways: dict[str, Way]
    facts: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.op} {self.case}, {self.shape}"

    @functools.cached_property
    def chain_difference(self) -> str:
        """What is wrong with the plain chain, without which no other way has a ratio."""
        wrong = self.ways[EAGER].difference()
        return f"the plain chain differs from the reference: {wrong}" if wrong else ""


def calls_for(moved: int) -> int:
    """Calls in one timing of work that moves this many bytes; one on a GPU, whose cache is flushed before each."""
    return 1 if DEVICE == "cuda" else min(MOST_CALLS, max(1, BYTES_A_TIMING // moved))


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under torch.compile, for its shapes alone; nothing compiles before the first call."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def repeated(call: Callable[[], Any], calls: int) -> Callable[[], Any]:
    """As many calls as one timing asks; the result of the last one."""

    def run() -> Any:
        for _ in range(calls):
            result = call()
        return result

    return run


def copying(moved: int, calls: int) -> Way:
    """A plain copy that moves as many bytes, half of them read and half of them written; so small a copy stays in the
    caches wherever the work does."""
    source = torch.randint(0, 127, (max(1, moved // 2),), dtype=torch.int8, device=DEVICE)
    target = torch.zeros_like(source)

    def difference() -> str:
        target.copy_(source)
        return "" if torch.equal(source, target) else "the copy differs"

    return Way(repeated(lambda: target.copy_(source), calls), difference)


class Bandwidth:
    """Bytes a second, read and written, of the fastest large copy so far; the copies are spread over the run."""

    def __init__(self) -> None:
        self.source, self.target = (torch.ones(LARGE_COPY, dtype=torch.int8, device=DEVICE) for _ in range(2))
        self.fastest = 0.0
        self.looked = -math.inf

    def look(self) -> None:
        """Copy again, if the last time is long enough ago."""
        if time.perf_counter() < self.looked + SECONDS_BETWEEN:
            return
        for _ in range(COPIES):
            start = time.perf_counter()
            self.target.copy_(self.source)
            synchronize()
            self.looked = time.perf_counter()
            self.fastest = max(self.fastest, 2 * LARGE_COPY / (self.looked - start))


def roofline_percent(moved: int, seconds: float, bandwidth: float) -> float:
    """How near the work comes to the time that moving its bytes takes, in percent: 100 * floor / seconds.

    The floor is `moved` / `bandwidth`: `moved` counts what the work has to read and write, each input and each output
    once, and `bandwidth` what the fastest large copy of the same run reads and writes in a second. 100 is a kernel that
    moves nothing twice and waits for nothing. A CPU can come out above 100 where the input still lies in a cache, since
    the large copy's doesn't; the small copy in the same group shows what is possible there. Work bound by arithmetic
    (a dense head on many rows) stays far below 100 however good it is.

    Args:
        moved: bytes.
        seconds: of one call.
        bandwidth: bytes a second.
    """
    return 100 * moved / bandwidth / seconds


def synchronize() -> None:
    """Wait for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@functools.cache
def _flushed() -> Tensor | None:
    """Memory that fills the GPU's L2 cache several times over; None on the CPU, where inputs stay as warm as they are
    in the engine's loop."""
    if DEVICE == "cpu":
        return None
    size = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    return torch.empty(4 * size, dtype=torch.int8, device=DEVICE)


class Rounds:
    """The untimed part of a way's rounds: state put back, L2 flushed, and the plain chain run on one side of it.

    Args:
        way, chain: what pytest-benchmark times, and what is timed beside it.
    """

    def __init__(self, way: Way, chain: Way) -> None:
        self.way, self.chain = way, chain
        self.coin = random.Random(0)
        self.chain_seconds: list[float] = []
        self.chain_first = False

    def timed(self) -> None:
        """What pytest-benchmark times; on a GPU it waits for the result."""
        self.way.call()
        synchronize()

    def before(self) -> None:
        """Before each round."""
        self.chain_first = self.coin.random() < 0.5
        if self.chain_first:
            self._run_chain()
        self._prepare(self.way)

    def after(self) -> None:
        """After each round."""
        if not self.chain_first:
            self._run_chain()

    def rounds_within(self, seconds: float, most: int) -> int:
        """How many rounds fit, after one that warms up; at least `FEWEST_ROUNDS` where `most` allows."""
        start = time.perf_counter()
        self.before()
        self.timed()
        self.after()
        return min(most, max(FEWEST_ROUNDS, int(seconds / (time.perf_counter() - start))))

    def _run_chain(self) -> None:
        self._prepare(self.chain)
        start = time.perf_counter()
        self.chain.call()
        synchronize()
        self.chain_seconds.append(time.perf_counter() - start)

    def _prepare(self, way: Way) -> None:
        way.restore()
        memory = _flushed()
        if memory is not None:
            memory.zero_()
        synchronize()


def ways_of(*more: str) -> Iterator[str]:
    """Names of the ways of a group: the back-ends timed here, the plain chain, the copy, and `more`."""
    yield from (*TIMED, EAGER, *more, COPY)
