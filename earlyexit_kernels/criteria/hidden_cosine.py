"""Hidden-state saturation.

Confident Adaptive Language Modeling. Tal Schuster et al. NeurIPS 2022, arXiv 2207.07061 ("hidden-state saturation"):
leave at the first layer whose hidden state has a cosine of at least the threshold with the layer's before it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from earlyexit_kernels.backends import jit, tl  # noqa: F401, the interpreter wants tl beside a step
from earlyexit_kernels.criteria.base import ANY_TASK, Criterion, Threshold, checked_threshold, threshold_at


@jit
def hidden_cosine_step(z, aux, cols, classes, state, rows, live, layer, depth, p0, p1, p2):
    return z, aux >= p0


@dataclasses.dataclass(frozen=True, kw_only=True)
class HiddenCosine(Criterion):
    """Leave where a layer hardly turns the pooled hidden state; needs no training, and any task will do.

    Args:
        threshold: in [-1, 1], or a list with one for each exit before the last.

    Raises:
        ValueError: a threshold is NaN or out of range.

    The states compared are pooled as the exits pool theirs: the mean over the row's tokens with ``pooling="mean"``,
    else the first token. Layer 1 is compared with the embeddings, pooled alike.

    Differences from the paper: it compares the states of a decoder's token.
    """

    threshold: Threshold
    name: ClassVar[str] = "hidden_cosine"
    needs: ClassVar[str | None] = "hidden_cosine"
    tasks: ClassVar[frozenset[str]] = ANY_TASK
    triton_step: ClassVar = hidden_cosine_step

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", checked_threshold("HiddenCosine", self.threshold, low=-1.0, high=1.0))

    def params(self, layer: int) -> list[float]:
        return [threshold_at(self.threshold, layer)]

    @staticmethod
    def rule(
        z: Tensor, aux: Tensor | None, state: Tensor, layer: int, depth: int, params: Sequence[float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert aux is not None
        return z, aux >= params[0], state
