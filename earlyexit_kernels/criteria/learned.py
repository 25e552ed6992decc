"""Learned exit ("learning to exit", LTE).

BERxiT: Early Exiting for BERT with Better Fine-Tuning and Extension to Regression. Ji Xin, Raphael Tang, Yaoliang Yu,
Jimmy Lin. EACL 2021, ACL Anthology 2021.eacl-main.8: a small head reads an exit's features and predicts how uncertain
its answer is; leave at the first layer where that falls below the threshold.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from earlyexit_kernels.backends import jit, tl  # noqa: F401, the interpreter requires tl in the module of a step
from earlyexit_kernels.criteria.base import ProbabilityThreshold


@jit
def learned_step(z, aux, cols, classes, state, rows, live, layer, depth, p0, p1, p2):
    return z, aux < p0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learned(ProbabilityThreshold):
    """Leave where the uncertainty predicted by a learned head falls below a threshold.

    Args:
        threshold: in [0, 1], or a list with one number for each exit before the last. The comparison is strict, as in
            the authors' code: with 0 no row leaves early.

    Raises:
        ValueError: a threshold is NaN or out of range.

    Differences from the paper: its text describes a certainty; this follows its code, whose head learns the
    uncertainty.

    Example:
        >>> import torch
        >>> import earlyexit_kernels as ee
        >>> uncertainty = torch.logit(torch.tensor([[0.4, 0.1, 0.1]]))
        >>> trace = ee.ExitTrace(torch.zeros(1, 3, 2), {"uncertainty": uncertainty})
        >>> ee.replay(trace, ee.criteria.Learned(threshold=0.2))[1].tolist()
        [2]
    """

    name: ClassVar[str] = "learned"
    needs: ClassVar[str | None] = "uncertainty"
    tasks: ClassVar[frozenset[str]] = frozenset({"single_label_classification", "regression"})
    triton_step: ClassVar = learned_step

    @staticmethod
    def rule(
        z: Tensor, aux: Tensor | None, state: Tensor, layer: int, depth: int, params: Sequence[float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert aux is not None
        return z, aux < params[0], state
