"""Shapes of the inputs of the pytest-benchmark files, and the names of the variants of a case.

A case has each back-end and the plain torch chain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.harness import Checked, Implementation, Variant
from benchmarks.machine import device
from benchmarks.micro.decisions import untimeable

#: The plain torch chain.
EAGER = "eager"
#: The variants of a case: the back-ends that can be timed here, and the plain chain.
NAMES = (*(backend for backend, reason in untimeable(device()).items() if not reason), EAGER)
#: Values of a shape beside the base point's.
SWEEPS = {"rows": (1, 8, 128, 1024), "classes": (2, 8, 64), "width": (384, 1024)}
#: Calls in one timing; one on a GPU, whose cache is flushed before it.
CALLS = {"cpu": 4, "cuda": 1}


@dataclass(frozen=True)
class Shape:
    """B rows of S tokens, C classes, width H."""

    rows: int = 32
    classes: int = 3
    width: int = 768
    length: int = 32

    def __str__(self) -> str:
        return f"B{self.rows}-C{self.classes}-H{self.width}-S{self.length}"


BASE = Shape()


def around(*fields: str) -> list[Shape]:
    """Return the base point, and the base point with each other value of some fields."""
    return [BASE, *(replace(BASE, **{name: value}) for name in fields for value in SWEEPS[name])]


def repeated(name: str, call: Callable[[], Any], check: Callable[[], Checked]) -> Implementation:
    """Return a variant whose timing makes `CALLS` calls."""

    def calls() -> None:
        for _ in range(CALLS[device()]):
            call()

    return Implementation(Variant(name), calls, check)
