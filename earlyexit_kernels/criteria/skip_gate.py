"""Layer skipping with an exit.

SmartBERT: A Promotion of Dynamic Early Exiting Mechanism for Accelerating BERT Inference. Boren Hu, Yun Zhu, Jiacheng
Li, Siliang Tang. IJCAI 2023, arXiv 2303.09266: before layer l a gate reads the row; where its value reaches s the row
passes the layer by, exit included. On the rows that run it, an entropy exit decides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from earlyexit_kernels.criteria.base import ANY_TASK, Criterion, checked_number, lacks


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkipGate(Criterion):
    """Skip the layers whose gate reaches a threshold, and leave where a rule says so at a layer that ran.

    Args:
        threshold: s in [0, 1]; a row skips a layer where its gate, the probability of skipping, is at least s. At 1 a
            gate that rounds to 1 still skips; to skip nothing, use `exit` alone.
        exit: the rule for the exits of the layers that ran, `Entropy` in the paper.

    Raises:
        ValueError: `threshold` is NaN or out of range, or `exit` is no criterion or skips layers itself.

    A skip changes every later hidden state, so that `replay` can't tell what would have happened.
    """

    threshold: float
    exit: Criterion
    name: ClassVar[str] = "skip_gate"
    tasks: ClassVar[frozenset[str]] = ANY_TASK

    def __post_init__(self) -> None:
        threshold = checked_number("SkipGate", "threshold", self.threshold, low=0.0, high=1.0)
        object.__setattr__(self, "threshold", threshold)
        if not isinstance(self.exit, Criterion) or self.exit.skip_from is not None:
            raise ValueError(
                f"SkipGate(exit=...): expected a criterion that decides at an exit, as Entropy(...), got {self.exit!r}"
            )

    @property
    def exit_rule(self) -> Criterion:
        """The rule that decides at the exit of a layer that ran."""
        return self.exit

    @property
    def skip_from(self) -> float | None:
        """The value of a layer's gate from which a row skips the layer."""
        return self.threshold

    def check(self, *, depth: int, classes: int, problem_type: str, aux: Sequence[str]) -> None:
        """As in `Criterion`: the heads need gates, and `exit` has to fit."""
        if "gate" not in aux:
            raise ValueError(lacks(self.name, "gate", aux))
        self.exit.check(depth=depth, classes=classes, problem_type=problem_type, aux=aux)
