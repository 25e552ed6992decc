"""Q-exit.

PALBERT: Teaching ALBERT to Ponder. Nikita Balagansky, Daniil Gavrilov. NeurIPS 2022, arXiv 2204.03276: with halting
probabilities lambda_l, leave at the first layer where cdf_l = 1 - prod_{j<=l} (1 - lambda_j) > q.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from earlyexit_kernels.arguments import Check, number
from earlyexit_kernels.backends import jit, tl
from earlyexit_kernels.criteria.base import Criterion
from earlyexit_kernels.types import ANY_TASK


@jit
def q_exit_step(z, aux, cols, classes, state, rows, live, layer, depth, p0, p1, p2):
    survival = tl.load(state, mask=live, other=1.0) * (1.0 - aux)
    tl.debug_barrier()
    tl.store(state, survival, mask=live)
    return z, (1.0 - survival > p0) | (p0 <= 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QExit(Criterion):
    """Leave at the q-quantile of the exit distribution of the halting head.

    Args:
        q: in [0, 1]; with 0 all rows leave at layer 1, with 1 no row leaves early, 0.5 is the median.

    Raises:
        ValueError: q is NaN or out of range.

    Differences from the paper's code: q = 0 is layer 1 (in the code it enters a branch that fails).

    Example:
        >>> import torch
        >>> import earlyexit_kernels as ee
        >>> trace = ee.ExitTrace(torch.zeros(1, 3, 2), {"halting": torch.tensor([[-1.0, 1.0, 1.0]])})
        >>> ee.replay(trace, ee.criteria.QExit(q=0.5))[1].tolist()
        [2]
    """

    q: float
    checks: ClassVar[Mapping[str, Check]] = {"q": number(low=0.0, high=1.0)}
    name: ClassVar[str] = "q_exit"
    needs: ClassVar[str | None] = "halting"
    tasks: ClassVar[frozenset[str]] = ANY_TASK
    triton_step: ClassVar = q_exit_step

    def params(self, layer: int) -> list[float]:
        return [self.q]

    def initial_state(self, classes: int) -> tuple[float, ...]:
        return (1.0,)

    @staticmethod
    def rule(
        z: Tensor, aux: Tensor | None, state: Tensor, layer: int, depth: int, params: Sequence[float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert aux is not None
        survival = state[0] * (1.0 - aux)
        return z, (1.0 - survival > params[0]) | (params[0] <= 0.0), survival[None]
