"""DACT exit: leave where later layers cannot change the label of the accumulated answer.

DACT-BERT: Differentiable Adaptive Computation Time for an Efficient BERT Inference. Cristobal Eyzaguirre, Felipe del
Rio, Vladimir Araujo, Alvaro Soto. NLP Power 2022, arXiv 2109.11745. With halting values h_n = 1 - lambda_n and
y_n = softmax(z_n): p_0 = 1, a_n = y_n p_{n-1} + a_{n-1} (1 - p_{n-1}), p_n = h_n p_{n-1}. The answer of the model is
a_L; a row leaves at the first layer from which its largest class cannot change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from earlyexit_kernels.arguments import Check, choice, number
from earlyexit_kernels.backends import constant, jit, tl
from earlyexit_kernels.criteria.base import TINY, Criterion, softmax
from earlyexit_kernels.criteria.softmax_step import argmax_lowest, shifted_exp

#: Margin by which a bound must hold, larger than the float32 error of the remaining layers.
MARGIN = 1e-6
STEP_MARGIN, STEP_TINY = constant(MARGIN), constant(TINY)


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
    kept = tl.exp(left * tl.log(tl.maximum(1.0 - p, STEP_TINY)))
    lead = tl.where(p0 > 0, (1.0 + top - second) * kept - 1.0, top * kept - second - p * left)
    return tl.log(tl.maximum(a, STEP_TINY)), (lead > STEP_MARGIN) | ((p1 > 0) & (p <= p1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dact(Criterion):
    """Leave where the remaining layers cannot change the label of the accumulated answer.

    With ``epsilon=0`` the label of a row is always the one of full depth. There is no threshold: speed is traded for
    accuracy in training, by the weight of the ponder cost. The answer is log a_n, whose softmax is a_n.

    Args:
        bound: ``"paper"``: a_top (1 - p)^d > a_second + p d, with d remaining layers. ``"tight"``:
            (a_top - a_second) (1 - p)^d > 1 - (1 - p)^d, which gives the same guarantee and never leaves later, since
            1 - (1 - p)^d <= p d.
        epsilon: in [0, 1]. Above 0, rows also leave where p <= epsilon: faster, but without the guarantee.

    Raises:
        ValueError: an argument is NaN, out of range or not one of the choices.

    Differences from the paper: strict comparison with a margin of 1e-6 on both sides, so that rounding and ties cannot
    break the guarantee; the tight bound and `epsilon` are additions.

    Example:
        >>> import torch
        >>> import earlyexit_kernels as ee
        >>> logits = torch.tensor([[[4.0, 0.0], [4.0, 0.0], [4.0, 0.0]]])
        >>> trace = ee.ExitTrace(logits, {"halting": torch.full((1, 3), 3.0)})
        >>> ee.replay(trace, ee.criteria.Dact())[1].tolist()
        [1]
    """

    bound: str = "paper"
    epsilon: float = 0.0
    checks: ClassVar[Mapping[str, Check]] = {
        "bound": choice("paper", "tight"),
        "epsilon": number(low=0.0, high=1.0),
    }
    name: ClassVar[str] = "dact"
    needs: ClassVar[str | None] = "halting"
    triton_step: ClassVar = dact_step

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
