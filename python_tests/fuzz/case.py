"""One case of a target: its random numbers and its errors."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


class WrongError(AssertionError):
    """The result of a valid call differs from that of the oracle."""


class AcceptedError(AssertionError):
    """An invalid call was accepted, or wrote something before it was refused."""


class Case:
    """Random numbers of one case, and a counter of its calls of the package.

    Args:
        target: name of the target.
        seed: seed of the run.
        number: number of the case.

    Attributes:
        calls: number of calls of the package so far.
        note: what the case has changed, for messages.
    """

    def __init__(self, target: str, seed: int, number: int) -> None:
        self.draw = random.Random(f"{target}:{seed}:{number}")
        self.arrays = np.random.Generator(np.random.PCG64(self.draw.getrandbits(64)))
        self.calls = 0
        self.note = ""

    def chance(self, probability: float) -> bool:
        """Return True with this probability."""
        return self.draw.random() < probability

    def choice(self, values: Sequence[T]) -> T:
        """Return one of `values`, all equally likely."""
        return self.draw.choice(values)

    def integer(self, low: int, high: int) -> int:
        """Return a whole number in ``[low, high]``."""
        return self.draw.randint(low, high)

    def uniform(self, low: float, high: float) -> float:
        """Return a number in ``[low, high]``."""
        return self.draw.uniform(low, high)

    def normal(self, *shape: int) -> np.ndarray:
        """Return standard normal numbers, float32."""
        return self.arrays.standard_normal(shape, dtype=np.float32)
