"""Sampled exit.

PonderNet: Learning to Ponder. Andrea Banino, Jan Balaguer, Charles Blundell. arXiv 2107.05407: halt at each step with
the probability lambda_l of the halting head. A baseline of PALBERT, arXiv 2204.03276.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from earlyexit_kernels.arguments import Check, whole
from earlyexit_kernels.backends import jit, tl
from earlyexit_kernels.criteria.base import Criterion
from earlyexit_kernels.hashing import scrambled, shifted_right
from earlyexit_kernels.types import ANY_TASK

#: Bits of a uniform number: the resolution of float32 in [0, 1).
BITS = 24


@jit
def sampled_exit_step(z, aux, cols, classes, state, rows, live, layer, depth, p0, p1, p2):
    survival = tl.load(state, mask=live, other=1.0) * (1.0 - aux)
    drawn = tl.load(state + rows, mask=live, other=1.0)
    tl.debug_barrier()
    tl.store(state, survival, mask=live)
    return z, 1.0 - survival > drawn


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampledExit(Criterion):
    """Leave at each layer with the halting probability: sample from the exit distribution of the halting head.

    Args:
        seed: a whole number; each seed gives another sample.

    Raises:
        ValueError: `seed` is not a whole number in [0, 2^63).

    Differences from the paper: one uniform number u for each row instead of one for each layer; the row leaves where
    the cdf exceeds u, which has the same distribution. u depends on the seed and the row's key only, so a row leaves at
    the same layer in any batch; rows with the same tokens have the same u.

    Example:
        >>> import torch
        >>> import earlyexit_kernels as ee
        >>> trace = ee.ExitTrace(torch.zeros(4, 3, 2), {"halting": torch.zeros(4, 3)}, keys=torch.arange(4))
        >>> ee.replay(trace, ee.criteria.SampledExit(seed=0))[1].shape
        torch.Size([4])
    """

    seed: int
    checks: ClassVar[Mapping[str, Check]] = {"seed": whole(low=0, high=2**63 - 1)}
    name: ClassVar[str] = "sampled_exit"
    needs: ClassVar[str | None] = "halting"
    tasks: ClassVar[frozenset[str]] = ANY_TASK
    uses_keys: ClassVar[bool] = True
    triton_step: ClassVar = sampled_exit_step

    def initial_state(self, classes: int) -> tuple[float, ...]:
        return (1.0, 0.0)

    def new_state(self, rows: int, device: torch.device, classes: int, keys: Tensor | None = None) -> Tensor:
        """Return the survival probability and u of each row; see `Criterion.new_state`.

        Raises:
            ValueError: no keys, or keys of another shape or dtype.
        """
        if keys is None:
            raise ValueError(
                "criterion 'sampled_exit' computes a number for each row from its key, got keys=None; use a trace of "
                "model.trace, which has keys, or give ExitTrace(keys=...) [N] int64"
            )
        if keys.shape != (rows,) or keys.dtype != torch.int64:
            raise ValueError(
                f"criterion 'sampled_exit': expected keys [{rows}] int64, got {list(keys.shape)} {keys.dtype}"
            )
        state = super().new_state(rows, device, classes)
        seed = torch.full((), self.seed, dtype=torch.int64, device=device)
        drawn = scrambled(keys.to(device) ^ scrambled(seed))
        state[1] = shifted_right(drawn, 64 - BITS).float() / 2**BITS
        return state

    @staticmethod
    def rule(
        z: Tensor, aux: Tensor | None, state: Tensor, layer: int, depth: int, params: Sequence[float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert aux is not None
        survival = state[0] * (1.0 - aux)
        return z, 1.0 - survival > state[1], torch.stack((survival, state[1]))
