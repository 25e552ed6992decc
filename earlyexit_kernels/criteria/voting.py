"""Voting exit.

Early Exiting with Ensemble Internal Classifiers. Tianxiang Sun et al. arXiv 2105.13792: the label of every exit passed
is a vote; leave where a class has enough of them, and answer with that class.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from earlyexit_kernels.backends import jit, tl
from earlyexit_kernels.criteria.base import Criterion, checked_choice, checked_number
from earlyexit_kernels.criteria.softmax_step import argmax_lowest

FINALS = ("vote", "last")
#: A class's number is votes * BALLOT + the layer of its last vote, so that the largest one wins and breaks ties; exact
#: in float32 up to BALLOT - 1 layers.
BALLOT = 4096


@jit
def voting_step(z, aux, cols, classes, state, rows, live, layer, depth, p0, p1, p2):
    at = state + cols * rows
    mine = cols < tl.where(live, classes, 0)
    ballots = tl.load(at, mask=mine, other=0.0)
    voted = cols == argmax_lowest(z, cols, classes)
    # 4096 is BALLOT
    votes = tl.floor(ballots / 4096.0) + tl.where(voted, 1.0, 0.0)
    ballots = tl.where(voted, votes * 4096.0 + tl.cast(layer, tl.float32), ballots)
    tl.debug_barrier()
    tl.store(at, ballots, mask=mine)
    top = tl.max(ballots, 0)
    smoothed = tl.where(cols < classes, votes + tl.where(ballots == top, 1.5, 1.0), 0.0)
    answer = tl.log(tl.where(cols < classes, smoothed / tl.sum(smoothed, 0), 1.0))
    keeps_last = (tl.cast(depth - layer, tl.int32) == 0) & (p1 > 0)
    return tl.where(keeps_last, z, answer), top >= p0 * 4096.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Voting(Criterion):
    """Leave where a class has `threshold` * l^gamma votes after l layers; votes add up and are never taken back.

    Args:
        threshold: at least 0. With gamma = 0 a number of votes: L + 1 never leaves early.
        gamma: in [0, 1]. 0 counts votes; 1 asks for a share of them, which is 1 at layer 1, so that no threshold up to
            1 waits there; between them the speed changes by small steps.
        final: what a row that reaches the last layer answers with, the ``"vote"`` or the ``"last"`` exit.

    Raises:
        ValueError: an argument is NaN, out of range or not one of the choices.

    The most recent vote decides between tied classes. The answer is the log of the smoothed share of the votes,
    (v_c + 1 + [c wins] / 2) / (sum v + C + 1/2).

    Differences from the paper: it leaves the normaliser l^gamma, the tie and the label at the last layer open.
    """

    threshold: float
    gamma: float = 0.0
    final: str = "vote"
    name: ClassVar[str] = "voting"
    triton_step: ClassVar = voting_step

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", checked_number("Voting", "threshold", self.threshold, low=0.0))
        object.__setattr__(self, "gamma", checked_number("Voting", "gamma", self.gamma, low=0.0, high=1.0))
        checked_choice("Voting", "final", self.final, FINALS)

    def params(self, layer: int) -> list[float]:
        # votes are whole: 0.7 * 10 asks for 7 of them, and not for 8 where the product rounds up
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
