"""Shapes, and groups of variants of one piece of work, for the pytest-benchmark files.

A group has each back-end and the plain torch chain, which is the baseline, and sometimes that chain compiled.
pytest-benchmark times one variant after the other; the ratio to the chain comes from interleaved rounds of the two, so
that a slow spell of the machine affects both. The chain's ratio to itself shows the noise.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Checked, Implementation, PreparedCase, Variant
from benchmarks.machine import device, synchronize
from benchmarks.micro.decisions import untimeable

EAGER, COMPILED = "eager", "compiled"
#: The plain chain as the baseline of a variant, which may be the chain itself.
CHAIN = Variant("baseline")
#: Back-ends that can be timed here.
TIMED = tuple(backend for backend, reason in untimeable(device()).items() if not reason)
#: Values of a shape beside the base point's.
SWEEPS = {"rows": (1, 8, 128, 1024), "classes": (2, 8, 64), "width": (384, 1024)}
#: Calls in one timing; one on a GPU, whose cache is flushed before it.
CALLS = {"cpu": 4, "cuda": 1}
#: Seconds that the rounds of one variant may take.
SECONDS, MIN_ROUNDS, WARM_UP = 0.1, 5, 2


@dataclass(frozen=True)
class Shape:
    """B rows of S tokens, C classes, width H."""

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


def around(*fields: str) -> list[Shape]:
    """Return the base point, and the base point with each other value of some fields."""
    return [BASE, *(replace(BASE, **{name: value}) for name in fields for value in SWEEPS[name])]


def variant_of(name: str) -> Variant:
    """Return the variant of a name in a group: a back-end, `EAGER` or `COMPILED`."""
    return Variant(EAGER, name, "float32") if name in TIMED else Variant(name, "", "float32")


@dataclass(frozen=True)
class Group:
    """One piece of work on one input.

    Attributes:
        op, case: name it.
        shape: of the input.
        variants: name -> implementation; each timing makes `CALLS` calls.
        facts: more fields for the records.
    """

    op: str
    case: str
    shape: Shape
    variants: dict[str, Implementation]
    facts: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.op} {self.case}, {self.shape}"

    def prepared(self, name: str) -> PreparedCase:
        """Check a variant and the chain that its ratio needs."""
        chain = replace(self.variants[EAGER], variant=CHAIN)
        pair = (self.variants[name], chain)
        return harness.prepare((each.variant, lambda each=each: each) for each in pair)


def repeated(name: str, call: Callable[[], Any], check: Callable[[], Checked]) -> Implementation:
    """Return a variant of a group whose timing makes `CALLS` calls."""

    def calls() -> None:
        for _ in range(CALLS[device()]):
            call()

    return Implementation(variant_of(name), calls, check)


def flush() -> None:
    """Wait for the device, and on a GPU flush its L2 cache; on a CPU inputs stay as warm as in the loop."""
    memory = _larger_than_the_cache()
    if memory is not None:
        memory.zero_()
    synchronize()


@functools.cache
def _larger_than_the_cache() -> Tensor | None:
    if device() == "cpu":
        return None
    return torch.empty(4 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.int8, device="cuda")


def rounds_within(seconds: float, call: Callable[[], Any], most: int) -> int:
    """Return how many calls fit into some seconds, after one that is timed; at least `MIN_ROUNDS` if `most` allows."""
    start = time.perf_counter()
    call()
    synchronize()
    return min(most, max(MIN_ROUNDS, int(seconds / (time.perf_counter() - start))))
