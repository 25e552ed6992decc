"""One case of a target: its random numbers, and what it can report."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


class WrongError(AssertionError):
    """A valid call gave a result that the oracle does not give."""


class AcceptedError(AssertionError):
    """An invalid call was accepted, or wrote something before it was refused."""


class Case:
    """The random numbers of one case, and the number of calls it has made of the package.

    Args:
        target: name of the target.
        seed: of the whole run.
        number: of the case.

    Attributes:
        calls: of the package, so far.
        note: what the case has spoiled, for messages.
    """

    def __init__(self, target: str, seed: int, number: int) -> None:
        self.draw = random.Random(f"{target}:{seed}:{number}")
        self.arrays = np.random.Generator(np.random.PCG64(self.draw.getrandbits(64)))
        self.calls = 0
        self.note = ""

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.draw.random() < probability

    def choice(self, values: Sequence[T]) -> T:
        """One of `values`, all equally likely."""
        return self.draw.choice(values)

    def integer(self, low: int, high: int) -> int:
        """A whole number in ``[low, high]``."""
        return self.draw.randint(low, high)

    def uniform(self, low: float, high: float) -> float:
        """A number in ``[low, high]``."""
        return self.draw.uniform(low, high)

    def normal(self, *shape: int) -> np.ndarray:
        """Standard normal numbers, float32."""
        return self.arrays.standard_normal(shape, dtype=np.float32)
