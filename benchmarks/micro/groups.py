"""Shapes, and groups of variants of one piece of work.

A group has each back-end and the plain torch chain, which is the baseline.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Checked, Implementation, Record, Variant
from benchmarks.machine import device, synchronize
from benchmarks.micro.decisions import untimeable

SUITE, BASELINE = "micro", "plain torch chain"
EAGER = "eager"
#: The plain chain as the baseline; it is timed as a variant too, and the ratio of the two shows the noise.
CHAIN = Variant("baseline")
#: Back-ends that can be timed here.
TIMED = tuple(backend for backend, reason in untimeable(device()).items() if not reason)
#: Values of a shape beside the base point's.
SWEEPS = {"rows": (1, 8, 128, 1024), "classes": (2, 8, 64), "width": (384, 1024)}
#: Calls in one timing; one on a GPU, whose cache is flushed before it.
CALLS = {"cpu": 4, "cuda": 1}
WARM_UP = 2


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
    """Return the variant of a name in a group: a back-end or `EAGER`."""
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

    def records(self, rounds: int) -> Iterator[Record]:
        """Check all variants, time them in turns, and yield a record for each."""

        def header(variant: Variant) -> Record:
            title, shape = f"{self.op} {self.case}", str(self.shape)
            fields = harness.record_header(SUITE, title, variant, shape=shape, baseline=BASELINE)
            return fields | {"op": self.op, "device": device(), "calls": CALLS[device()], **self.facts}

        case = harness.prepare((each.variant, lambda each=each: each) for each in self.variants.values())
        yield from case.skipped_records(header)
        mine, chain = list(case.ready), self.variants[EAGER]
        if chain.variant not in mine:
            return
        case.ready[CHAIN] = chain
        times = case.times(rounds=rounds, warmup=WARM_UP, sync=synchronize, prepare=flush)
        for variant in mine:
            fields = harness.time_fields(times[variant], CALLS[device()])
            yield header(variant) | fields | harness.ratio_fields(times[variant], times[CHAIN]) | {"goal": None}


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
