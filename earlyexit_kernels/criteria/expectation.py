"""Expected answer.

PALBERT: Teaching ALBERT to Ponder. Nikita Balagansky, Daniil Gavrilov. NeurIPS 2022, arXiv 2204.03276 ("expectation"):
all layers run, and the answer is the mean of the exits' class probabilities under the exit distribution of the halting
head: weight lambda_l prod_{j<l} (1 - lambda_j) at layers l < L, and the remaining weight at layer L.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from earlyexit_kernels.backends import constant, jit, tl
from earlyexit_kernels.criteria.base import TINY, Criterion, softmax
from earlyexit_kernels.criteria.softmax_step import shifted_exp

STEP_TINY = constant(TINY)


@jit
def expectation_step(z, aux, cols, classes, state, rows, live, layer, depth, p0, p1, p2):
    _d, e = shifted_exp(z, cols, classes)
    at = state + (1 + cols) * rows
    mine = cols < tl.where(live, classes, 0)
    survival = tl.load(state, mask=live, other=1.0)
    weight = survival * tl.where(tl.cast(depth - layer, tl.int32) == 0, 1.0, aux)
    value = tl.where(tl.cast(classes, tl.int32) > 1, e / tl.sum(e, 0), z)
    mean = tl.load(at, mask=mine, other=0.0) + tl.where(weight > 0, weight * value, 0.0)
    tl.debug_barrier()
    tl.store(state, survival * (1.0 - aux), mask=live)
    tl.store(at, mean, mask=mine)
    answer = tl.where(tl.cast(classes, tl.int32) > 1, tl.log(tl.maximum(mean, STEP_TINY)), mean)
    return answer, weight < 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expectation(Criterion):
    """Run all layers and answer with the expected probabilities (for one output: the expected output).

    It saves no time; it is a baseline for `QExit` and `SampledExit`. The softmax of the answer is the expected
    distribution.

    Differences from the paper's code: the last exit has the weight 1 - sum_{l<L} w_l, so that the weights add up to 1;
    in the code it has 1 - w_L.

    Example:
        >>> import torch
        >>> import earlyexit_kernels as ee
        >>> trace = ee.ExitTrace(torch.tensor([[[0.0, 9.0], [9.0, 0.0]]]), {"halting": torch.zeros(1, 2)})
        >>> answer, exit_layer = ee.replay(trace, ee.criteria.Expectation())
        >>> [round(p, 3) for p in answer.softmax(dim=-1)[0].tolist()], exit_layer.tolist()
        ([0.5, 0.5], [2])
    """

    name: ClassVar[str] = "expectation"
    needs: ClassVar[str | None] = "halting"
    tasks: ClassVar[frozenset[str]] = frozenset({"single_label_classification", "regression"})
    triton_step: ClassVar = expectation_step

    def initial_state(self, classes: int) -> tuple[float, ...]:
        return (1.0, *[0.0] * classes)

    def check(self, *, depth: int, classes: int, problem_type: str, aux: Sequence[str]) -> None:
        super().check(depth=depth, classes=classes, problem_type=problem_type, aux=aux)
        if (problem_type == "regression") != (classes == 1):
            raise ValueError(
                f"criterion 'expectation' averages one output or the probabilities of several classes, got "
                f"{problem_type} with {classes} output(s)"
            )

    @staticmethod
    def rule(
        z: Tensor, aux: Tensor | None, state: Tensor, layer: int, depth: int, params: Sequence[float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert aux is not None
        survival, one_output = state[0], z.shape[1] == 1
        weight = survival if layer == depth else survival * aux
        value = z if one_output else softmax(z)
        mean = state[1:].T + torch.where(weight > 0, weight * value.T, 0.0).T
        answer = mean if one_output else mean.clamp(min=TINY).log()
        stays = torch.zeros_like(aux, dtype=torch.bool)
        return answer, stays, torch.cat(((survival * (1.0 - aux))[None], mean.T))
