"""Patience exit.

BERT Loses Patience: Fast and Robust Inference with Early Exit. Wangchunshu Zhou et al. NeurIPS 2020, arXiv 2006.04152:
cnt_1 = 0; cnt_l = cnt_{l-1} + 1 where exit l agrees with exit l-1, else 0; leave where cnt_l = P.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from earlyexit_kernels.arguments import Check, number, optional, whole
from earlyexit_kernels.backends import jit, tl
from earlyexit_kernels.criteria.base import MAX_COUNT, Criterion, lowest_argmax
from earlyexit_kernels.criteria.softmax_step import argmax_lowest


@jit
def patience_step(z, aux, cols, classes, state, rows, live, layer, depth, p0, p1, p2):
    last = tl.load(state, mask=live, other=0.0)
    count = tl.load(state + rows, mask=live, other=0.0)
    labels = p1 < 0
    value = tl.sum(tl.where(cols == 0, z, 0.0), 0)
    now = tl.where(labels, argmax_lowest(z, cols, classes).to(tl.float32), value)
    agrees = tl.where(labels, now == last, tl.abs(now - last) < p1)
    count = tl.where(agrees, count + 1.0, 0.0)
    tl.debug_barrier()
    tl.store(state, now, mask=live)
    tl.store(state + rows, count, mask=live)
    return z, count >= p0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patience(Criterion):
    """Leave where `patience` consecutive exits agree with the previous one.

    The earliest such layer is patience + 1.

    Args:
        patience: P >= 1. In PABEE's code 0 means "run all layers"; that is `criterion=None` here.
        tolerance: None compares labels. A number > 0 is for regression (C = 1): exits agree where their outputs
            differ by less. Each exit is compared with the previous one only, so a slow drift is not detected.

    Raises:
        ValueError: `patience` is not a whole number >= 1, or `tolerance` is not a finite number > 0.

    Example:
        >>> import torch
        >>> import earlyexit_kernels as ee
        >>> trace = ee.ExitTrace(torch.tensor([[[2.0, 0.0], [0.0, 2.0], [0.0, 1.0], [0.0, 3.0]]]))
        >>> ee.replay(trace, ee.criteria.Patience(patience=1))[1].tolist()
        [3]
    """

    patience: int
    tolerance: float | None = None
    checks: ClassVar[Mapping[str, Check]] = {
        "patience": whole(low=1, high=MAX_COUNT, hint=" (criterion=None runs all layers)"),
        "tolerance": optional(number(low=0.0, inside=True)),
    }
    name: ClassVar[str] = "patience"
    tasks: ClassVar[frozenset[str]] = frozenset({"single_label_classification", "regression"})
    triton_step: ClassVar = patience_step

    def params(self, layer: int) -> list[float]:
        return [float(self.patience), -1.0 if self.tolerance is None else self.tolerance]

    def initial_state(self, classes: int) -> tuple[float, ...]:
        return (math.nan, 0.0)

    def check(self, *, depth: int, classes: int, problem_type: str, aux: Sequence[str]) -> None:
        super().check(depth=depth, classes=classes, problem_type=problem_type, aux=aux)
        regression = problem_type == "regression"
        if regression == (self.tolerance is None) or regression != (classes == 1):
            cure = "leave tolerance out, for several classes"
            if regression:
                cure = "give tolerance=..." if classes == 1 else "it supports one output only"
            raise ValueError(f"Patience(tolerance={self.tolerance}) on {problem_type} with {classes} output(s): {cure}")

    @staticmethod
    def rule(
        z: Tensor, aux: Tensor | None, state: Tensor, layer: int, depth: int, params: Sequence[float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        last, count = state
        patience, tolerance = params
        if tolerance < 0:
            now = lowest_argmax(z)
            agrees = now == last
        else:
            now = z[:, 0]
            agrees = (now - last).abs() < tolerance
        count = torch.where(agrees, count + 1.0, 0.0)
        return z, count >= patience, torch.stack((now, count))
