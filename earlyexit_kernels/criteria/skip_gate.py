"""Layer skipping with an exit.

SmartBERT: A Promotion of Dynamic Early Exiting Mechanism for Accelerating BERT Inference. Boren Hu, Yun Zhu, Jiacheng
Li, Siliang Tang. IJCAI 2023, arXiv 2303.09266: before layer l a gate reads the row; where its value reaches s the row
skips the layer and its exit. For the rows that run it, an entropy exit decides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from earlyexit_kernels.arguments import Check, number
from earlyexit_kernels.criteria.base import Criterion, missing_output_message
from earlyexit_kernels.types import ANY_TASK


def exit_criterion(where: str, value: Any) -> Criterion:
    """Allow a criterion that decides at an exit and skips no layers."""
    if not isinstance(value, Criterion) or value.skip_from is not None:
        raise ValueError(f"{where}: expected a criterion that decides at an exit, as Entropy(...), got {value!r}")
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkipGate(Criterion):
    """Skip the layers whose gate reaches a threshold, and apply an exit rule at the layers that run.

    A skip changes every later hidden state, so this criterion cannot be replayed.

    Args:
        threshold: s in [0, 1]; a row skips a layer where its gate, the probability of skipping, is at least s. With 1
            a gate that rounds to 1 still skips; to skip nothing, use `exit` alone.
        exit: the rule for the exits of the layers that run, `Entropy` in the paper.

    Raises:
        ValueError: `threshold` is NaN or out of range, or `exit` is not a criterion or skips layers itself.

    Example:
        >>> import earlyexit_kernels as ee
        >>> gate = ee.criteria.SkipGate(threshold=0.5, exit=ee.criteria.Entropy(threshold=0.3))
        >>> gate.exit_rule.name, gate.skip_from
        ('entropy', 0.5)
    """

    threshold: float
    exit: Criterion
    checks: ClassVar[Mapping[str, Check]] = {"threshold": number(low=0.0, high=1.0), "exit": exit_criterion}
    name: ClassVar[str] = "skip_gate"
    tasks: ClassVar[frozenset[str]] = ANY_TASK

    @property
    def exit_rule(self) -> Criterion:
        """The rule that decides at the exit of a layer that runs."""
        return self.exit

    @property
    def skip_from(self) -> float | None:
        """The value of a layer's gate from which a row skips the layer."""
        return self.threshold

    def check(self, *, depth: int, classes: int, problem_type: str, aux: Sequence[str]) -> None:
        """Check that the heads have gates and that `exit` fits; see `Criterion.check`."""
        if "gate" not in aux:
            raise ValueError(missing_output_message(self.name, "gate", aux))
        self.exit.check(depth=depth, classes=classes, problem_type=problem_type, aux=aux)
