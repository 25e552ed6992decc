"""The targets, with their shares of the time and the limits of a case."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

from fuzz.case import Case


@dataclasses.dataclass(frozen=True)
class Target:
    """One target.

    Attributes:
        module: module with ``run(case)`` and optionally ``prepare()``, called once before workers are forked.
        share: share of the time, relative to the other targets.
        limit: maximum seconds of one case; a longer one counts as a crash.
        memory: bytes that a worker may allocate in addition to its initial memory, or None for no limit.
    """

    module: str
    share: float
    limit: float
    memory: int | None = None

    def load(self) -> Callable[[Case], Any]:
        """Import the target and prepare it."""
        module = importlib.import_module(self.module)
        getattr(module, "prepare", lambda: None)()
        return module.run


TARGETS = {
    "ops": Target("fuzz.ops", 2, 20),
    "hostile": Target("fuzz.hostile", 1.5, 20, memory=2 << 30),
    "models": Target("fuzz.whole_models", 2, 60),
    "weights": Target("fuzz.weights", 1.5, 60),
    "checkpoints": Target("fuzz.checkpoints", 1.5, 30, memory=2 << 30),
    "cli": Target("fuzz.cli", 1.5, 120, memory=2 << 30),
}
