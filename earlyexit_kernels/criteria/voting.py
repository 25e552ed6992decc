"""Voting exit.

Early Exiting with Ensemble Internal Classifiers. Tianxiang Sun et al. arXiv 2105.13792: the label of every exit is a
vote; leave where a class has enough votes, and answer with that class.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from earlyexit_kernels.arguments import Check, choice, number
from earlyexit_kernels.backends import constant, jit, tl
from earlyexit_kernels.criteria.base import Criterion
from earlyexit_kernels.criteria.softmax_step import argmax_lowest

#: The state of a class is votes * BALLOT + the layer of its last vote, so that the largest one wins and ties go to the
#: most recent vote; exact in float32 up to BALLOT - 1 layers.
BALLOT = 4096
STEP_BALLOT = constant(float(BALLOT))


@jit
def voting_step(z, aux, cols, classes, state, rows, live, layer, depth, p0, p1, p2):
    at = state + cols * rows
    mine = cols < tl.where(live, classes, 0)
    ballots = tl.load(at, mask=mine, other=0.0)
    voted = cols == argmax_lowest(z, cols, classes)
    votes = tl.floor(ballots / STEP_BALLOT) + tl.where(voted, 1.0, 0.0)
    ballots = tl.where(voted, votes * STEP_BALLOT + tl.cast(layer, tl.float32), ballots)
    tl.debug_barrier()
    tl.store(at, ballots, mask=mine)
    top = tl.max(ballots, 0)
    smoothed = tl.where(cols < classes, votes + tl.where(ballots == top, 1.5, 1.0), 0.0)
    answer = tl.log(tl.where(cols < classes, smoothed / tl.sum(smoothed, 0), 1.0))
    keeps_last = (tl.cast(depth - layer, tl.int32) == 0) & (p1 > 0)
    return tl.where(keeps_last, z, answer), top >= p0 * STEP_BALLOT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Voting(Criterion):
    """Leave where a class has at least `threshold` * l^gamma votes after l layers.

    Args:
        threshold: at least 0. With gamma = 0 it is a number of votes; with L + 1 no row leaves early.
        gamma: in [0, 1]. 0 compares the number of votes; 1 compares the share of the votes, which is 1 at layer 1, so
            that with a threshold up to 1 all rows leave there. Values between give smaller steps of speed.
        final: the answer of a row that reaches the last layer: the ``"vote"`` or the ``"last"`` exit.

    Raises:
        ValueError: an argument is NaN, out of range or not one of the choices.

    Ties go to the class with the most recent vote. The answer is the log of the smoothed share of the votes,
    (v_c + 1 + [c wins] / 2) / (sum v + C + 1/2).

    Differences from the paper: it does not define the normaliser l^gamma, ties and the label at the last layer.

    Example:
        >>> import torch
        >>> import earlyexit_kernels as ee
        >>> trace = ee.ExitTrace(torch.tensor([[[2.0, 0.0], [0.0, 2.0], [0.0, 1.0], [0.0, 3.0]]]))
        >>> ee.replay(trace, ee.criteria.Voting(threshold=2))[1].tolist()
        [3]
    """

    threshold: float
    gamma: float = 0.0
    final: str = "vote"
    checks: ClassVar[Mapping[str, Check]] = {
        "threshold": number(low=0.0),
        "gamma": number(low=0.0, high=1.0),
        "final": choice("vote", "last"),
    }
    name: ClassVar[str] = "voting"
    triton_step: ClassVar = voting_step

    def params(self, layer: int) -> list[float]:
        # votes are whole numbers: 0.7 * 10 requires 7 of them, not 8 where the product rounds up
        votes = math.ceil(min(self.threshold * layer**self.gamma, BALLOT) - 1e-9)
        return [float(votes), float(self.final == "last")]

    def initial_state(self, classes: int) -> tuple[float, ...]:
        return (0.0,) * classes

    def check(self, *, depth: int, classes: int, problem_type: str, aux: Sequence[str]) -> None:
        super().check(depth=depth, classes=classes, problem_type=problem_type, aux=aux)
        if depth >= BALLOT:
            raise ValueError(f"criterion 'voting' counts the votes of up to {BALLOT - 1} layers, got {depth}")

    @staticmethod
    def rule(
        z: Tensor, aux: Tensor | None, state: Tensor, layer: int, depth: int, params: Sequence[float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        needed, keeps_last = params
        label = z.argmax(dim=1)[None]
        votes = (state.gather(0, label) / BALLOT).floor() + 1.0
        ballots = state.scatter(0, label, votes * BALLOT + layer)
        top = ballots.max(dim=0).values
        leave = top >= needed * BALLOT
        if layer == depth and keeps_last:
            return z, leave, ballots
        smoothed = (ballots / BALLOT).floor() + torch.where(ballots == top, 1.5, 1.0)
        return (smoothed / smoothed.sum(dim=0)).log().T, leave, ballots
