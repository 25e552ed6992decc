"""DACT exit.

DACT-BERT: Differentiable Adaptive Computation Time for an Efficient BERT Inference. Cristobal Eyzaguirre, Felipe del
Rio, Vladimir Araujo, Alvaro Soto. NLP Power 2022, arXiv 2109.11745. With halting values h_n = 1 - lambda_n and
y_n = softmax(z_n): p_0 = 1, a_n = y_n p_{n-1} + a_{n-1} (1 - p_{n-1}), p_n = h_n p_{n-1}. The answer of the model is
a_L; a row leaves at the layer from which on its largest class can't change any more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from earlyexit_kernels.backends import jit, tl
from earlyexit_kernels.criteria.base import TINY, Criterion, checked_choice, checked_number, softmax
from earlyexit_kernels.criteria.softmax_step import argmax_lowest, shifted_exp

BOUNDS = ("paper", "tight")
#: By how much a bound must hold: more than float32 can err by in the layers to come.
MARGIN = 1e-6


@jit
def dact_step(z, aux, cols, classes, state, rows, live, layer, depth, p0, p1, p2):
    _d, e = shifted_exp(z, cols, classes)
    at = state + (1 + cols) * rows
    mine = cols < tl.where(live, classes, 0)
    before = tl.load(state, mask=live, other=1.0)
    a = tl.load(at, mask=mine, other=0.0)
    a += (e / tl.sum(e, 0) - a) * before
    p = (1.0 - aux) * before
    tl.debug_barrier()
    tl.store(state, p, mask=live)
    tl.store(at, a, mask=mine)
    best = argmax_lowest(a, cols, classes)
    top = tl.max(a, 0)
    second = tl.max(tl.where(cols == best, 0.0, a), 0)
    left = tl.cast(depth - layer, tl.float32)
    # 1.17...e-38 is the smallest normal number, 1e-6 is MARGIN
    kept = tl.exp(left * tl.log(tl.maximum(1.0 - p, 1.1754943508222875e-38)))
    lead = tl.where(p0 > 0, (1.0 + top - second) * kept - 1.0, top * kept - second - p * left)
    return tl.log(tl.maximum(a, 1.1754943508222875e-38)), (lead > 1e-6) | ((p1 > 0) & (p <= p1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dact(Criterion):
    """Leave where the layers to come can't change the label of the accumulated answer, so that no label ever differs.

    Args:
        bound: ``"paper"``: a_top (1 - p)^d > a_second + p d, with d layers to come. ``"tight"``:
            (a_top - a_second) (1 - p)^d > 1 - (1 - p)^d, which is as sure, and never later since
            1 - (1 - p)^d <= p d.
        epsilon: in [0, 1]. Above 0, also leave where p <= epsilon: faster, without the guarantee.

    Raises:
        ValueError: an argument is NaN, out of range or not one of the choices.

    There is no threshold: speed is traded for accuracy in training, by the weight of the ponder cost. The answer is
    log a_n, whose softmax is a_n.

    Differences from the paper: strict comparison with a margin of 1e-6 on both sides, so that rounding and ties can't
    break the guarantee; the tight bound and `epsilon` are ours.
    """

    bound: str = "paper"
    epsilon: float = 0.0
    name: ClassVar[str] = "dact"
    needs: ClassVar[str | None] = "halting"
    triton_step: ClassVar = dact_step

    def __post_init__(self) -> None:
        checked_choice("Dact", "bound", self.bound, BOUNDS)
        object.__setattr__(self, "epsilon", checked_number("Dact", "epsilon", self.epsilon, low=0.0, high=1.0))

    def params(self, layer: int) -> list[float]:
        return [float(self.bound == "tight"), self.epsilon]

    def initial_state(self, classes: int) -> tuple[float, ...]:
        return (1.0, *[0.0] * classes)

    @staticmethod
    def rule(
        z: Tensor, aux: Tensor | None, state: Tensor, layer: int, depth: int, params: Sequence[float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert aux is not None
        tight, epsilon = params
        before, left = state[0], depth - layer
        a = state[1:].lerp(softmax(z).T, before)
        p = (1.0 - aux) * before
        top, second = a.topk(2, dim=0).values
        kept = (1.0 - p).pow(left)
        lead = (1.0 + top - second) * kept - 1.0 if tight else (top * kept - second).sub_(p, alpha=left)
        leave = lead > MARGIN
        if epsilon > 0:
            leave |= p <= epsilon
        return a.clamp(min=TINY).log().T, leave, torch.cat((p[None], a))
