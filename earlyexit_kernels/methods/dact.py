"""DACT-BERT: train exits that accumulate a mixed answer.

DACT-BERT: Differentiable Adaptive Computation Time for an Efficient BERT Inference. Cristobal Eyzaguirre, Felipe del
Rio, Vladimir Araujo, Alvaro Soto. NLP Power! at ACL 2022, arXiv 2109.11745: with y_n = softmax z_n, p_0 = 1 and
halting values h_n in (0, 1), a_n = y_n p_{n-1} + a_{n-1} (1 - p_{n-1}) and p_n = h_n p_{n-1}; the loss is
NLL(a_N) + tau sum_n p_n.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from earlyexit_kernels.arguments import Check, choice, flag, number
from earlyexit_kernels.methods.base import (
    ENCODER,
    PARTS,
    Method,
    PhaseSpec,
    TrainingStep,
    at_least_float32,
    labelled,
    needed,
    row_mean,
)
from earlyexit_kernels.methods.deebert import Deebert
from earlyexit_kernels.methods.joint import Joint
from earlyexit_kernels.types import CLASSIFICATION, ExitTrace

#: Minimum of a_N of the right class in the log loss.
SMALLEST = 1e-8
#: First phase by the value of `start`.
STARTS = {
    "joint": PhaseSpec(name="exits", trains=frozenset(PARTS) - {"halting"}, epochs=2.0),
    "last": PhaseSpec(name="backbone", trains=ENCODER, epochs=2.0),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dact(Method):
    """Log loss of the mixed answer a_N, plus a ponder cost for each layer whose answer is not final.

    For single-label classification. The paper trades accuracy for speed through `ponder`: one model for each point. It
    fine-tunes the encoder first. Here a first phase of two epochs at 2e-5 trains what `start` says, without the halting
    outputs; the phase ``"dact"`` then trains all parts, two epochs at 1e-5. These numbers are the choice of this
    package.

    Args:
        start: the first phase. ``"joint"``: phase ``"exits"`` trains the encoder and all exits with the loss of
            `Joint`. ``"last"``, as in the paper: phase ``"backbone"`` trains the encoder and the last exit with the
            loss of that exit. None: no first phase, and three epochs at 2e-5; for an encoder that is fine-tuned
            already, or a model that `to_early_exit` converts from ``"joint"``.
        ponder: tau, weight of the ponder cost, at least 0; the values of the paper could not be verified, those of its
            code are in 1e-3..5e-2.
        include_last: whether p_N, which has no effect on the answer, is part of the cost, as in the formula.
        shared: whether all layers share one exit and one halting output; the paper does not define it.
        halting_bias: initial bias of the halting logit s, where lambda = sigmoid(s) = 1 - h; -2.2 is h = 0.9. Around
            h = 0.5 the deep exits barely learn, since p_n decreases like 0.5^n.

    Raises:
        ValueError: an argument out of range.

    Differences from the paper: `start` is ``"joint"``, since the phase ``"dact"`` hardly trains fresh first exits. The
    weight of exit n in a_N is p_{n-1} prod_{m=n}^{N-1} (1 - p_m): with `halting_bias` -2.2 on six layers .0007, .0065,
    .03, .10, .27 and .59 at the start, and with ``"last"`` no other phase trains exits 1 to N - 1. Difference from the
    code of DACT for images, which the paper extends: no constant 1 in the ponder cost.

    Example:
        >>> import earlyexit_kernels as ee
        >>> ee.methods.Dact(ponder=0.05).answering()
        {'name': 'dact'}
    """

    start: str | None = "joint"
    ponder: float = 0.01
    include_last: bool = True
    shared: bool = False
    halting_bias: float = -2.2
    name: ClassVar[str] = "dact"
    tasks: ClassVar[frozenset[str]] = CLASSIFICATION
    rule: ClassVar[str] = "dact"
    when_missing: ClassVar[Mapping[str, Any]] = {"start": None}
    checks: ClassVar[Mapping[str, Check]] = {
        "start": choice(None, "joint", "last"),
        "ponder": number(low=0.0),
        "include_last": flag,
        "shared": flag,
        "halting_bias": number(),
    }

    @property
    def phases(self) -> tuple[PhaseSpec, ...]:
        if self.start is None:
            return (PhaseSpec(name="dact"),)
        return (STARTS[self.start], PhaseSpec(name="dact", epochs=2.0, lr=1e-5))

    def answering(self) -> dict[str, Any] | None:
        return {"name": "dact"}

    def head_changes(self, shares_layers: bool) -> dict[str, Any]:
        return {
            "halting": True,
            "halting_input": "single",
            "halting_layers": 1,
            "halting_shared": self.shared,
            "shared_exit": self.shared,
            "halting_bias": self.halting_bias,
        }

    def loss(self, trace: ExitTrace, labels: Tensor | None, step: TrainingStep) -> Tensor:
        if self.start is not None and step.phase == 0:
            method = Joint() if self.start == "joint" else Deebert()
            return method.loss(trace, labels, step)
        labels = needed(labels).to(trace.logits.device).view(-1)
        y = at_least_float32(trace.logits).softmax(dim=-1)
        a, p = mixed_answer(y, self.aux(trace, "halting"))
        wrong = F.nll_loss(a.clamp(min=SMALLEST).log(), labels, reduction="none")
        price = (p if self.include_last else p[:, :-1]).sum(dim=1)
        return row_mean(wrong + self.ponder * price, labelled(labels, step.problem_type, trace.logits))


def mixed_answer(y: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Return a_N ``[N, C]`` and p ``[N, L]`` for class probabilities ``[N, L, C]`` and halting logits ``[N, L]``."""
    p = F.logsigmoid(-s).cumsum(dim=1).exp()
    a = y[:, 0]
    for n in range(1, y.shape[1]):
        a = torch.lerp(a, y[:, n], p[:, n - 1, None])
    return a, p
