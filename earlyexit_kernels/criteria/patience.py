"""Patience exit.

BERT Loses Patience: Fast and Robust Inference with Early Exit. Wangchunshu Zhou et al. NeurIPS 2020, arXiv 2006.04152:
cnt_1 = 0; cnt_l = cnt_{l-1} + 1 where exit l agrees with exit l-1, else 0; leave where cnt_l = P.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from earlyexit_kernels.backends import jit, tl
from earlyexit_kernels.criteria.base import MOST_COUNTED, Criterion, checked_number, checked_whole, lowest_argmax
from earlyexit_kernels.criteria.softmax_step import argmax_lowest


@jit
def patience_step(z, aux, cols, classes, state, rows, live, layer, depth, p0, p1, p2):
    last = tl.load(state, mask=live, other=0.0)
    count = tl.load(state + rows, mask=live, other=0.0)
    label = argmax_lowest(z, cols, classes).to(tl.float32)
    value = tl.sum(tl.where(cols == 0, z, 0.0), 0)
    agrees = tl.where(p1 < 0, label == last, tl.abs(value - last) < p1)
    count = tl.where(agrees, count + 1.0, 0.0)
    tl.debug_barrier()
    tl.store(state, tl.where(p1 < 0, label, value), mask=live)
    tl.store(state + rows, count, mask=live)
    return z, count >= p0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patience(Criterion):
    """Leave where `patience` exits in a row agree with the one before them, so at layer patience + 1 at the earliest.

    Args:
        patience: P >= 1. PABEE's code takes 0 for "run all layers"; that is `criterion=None` here.
        tolerance: None compares labels. A number > 0 is for regression (C = 1): exits agree where their outputs
            differ by less; each is compared with the one right before it, so a slow drift passes.

    Raises:
        ValueError: `patience` isn't a whole number >= 1, or `tolerance` isn't a finite number > 0.
    """

    patience: int
    tolerance: float | None = None
    name: ClassVar[str] = "patience"
    tasks: ClassVar[frozenset[str]] = frozenset({"single_label_classification", "regression"})
    triton_step: ClassVar = patience_step

    def __post_init__(self) -> None:
        hint = " (criterion=None runs all layers)"
        patience = checked_whole("Patience", "patience", self.patience, low=1, high=MOST_COUNTED, hint=hint)
        object.__setattr__(self, "patience", patience)
        if self.tolerance is not None:
            tolerance = checked_number("Patience", "tolerance", self.tolerance, low=0.0)
            if tolerance == 0.0:
                raise ValueError("Patience(tolerance=...): expected a number > 0 (0 would never agree), got 0")
            object.__setattr__(self, "tolerance", tolerance)

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
                cure = "give tolerance=..." if classes == 1 else "it compares one output, and knows no several"
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
