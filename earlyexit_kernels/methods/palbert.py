"""PALBERT: minimise the expected loss of a row that leaves at a random layer, with a prior on that layer.

PALBERT: Teaching ALBERT to Ponder. Nikita Balagansky, Daniil Gavrilov. NeurIPS 2022, arXiv 2204.03276 (after PonderNet,
Andrea Banino et al. 2021, arXiv 2107.05407). With halting probabilities lambda_l = sigmoid(s_l) the probability
to leave at layer l is q_l = lambda_l prod_{j<l} (1 - lambda_j); the loss is sum_l q_l L_l + beta KL of q and a
geometric prior.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from earlyexit_kernels.arguments import Check, choice, flag, number, optional, whole
from earlyexit_kernels.methods.base import Method, PhaseSpec, TrainingStep, exit_losses, labelled, row_mean
from earlyexit_kernels.types import ExitTrace

#: lambda_p of the paper, and the layers of its ALBERT.
PAPER_PRIOR, PAPER_DEPTH = 0.1, 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Palbert(Method):
    """Expected task loss over the exits, plus beta times the divergence from a truncated geometric prior.

    For any task. At most 25 epochs at 1e-5, as in the public code, which uses early stopping: give the Trainer its
    EarlyStoppingCallback.

    Args:
        beta: weight of the divergence, at least 0.
        prior: lambda_p in (0, 1), the prior's probability to leave at a layer; the last layer has the remaining mass.
            None is 1 - .9^(11 / (L - 1)): on L layers the last one then has .9^11 = .31 of the mass, as on the twelve
            layers of the paper with its .1. A model's config records the number.
        kl: ``"prior_posterior"`` is KL(prior || q), as in the public code; ``"posterior_prior"`` is KL(q || prior), as
            in the paper.
        close_tail: whether the last layer has all remaining mass, so that q sums to 1; False as in the public code,
            where lambda_L counts and mass is lost.
        halting_input: input of the halting head, from the pooled vectors r_l: ``"concat"`` [r_l; r_{l-1}], ``"diff"``
            r_l - r_{l-1} (the default of the public code), ``"single"`` r_l (PonderNet).
        halting_layers: 1 is one linear; n >= 2 is n hidden layers with tanh and a linear, as in the public code.
        halting_phase: add a phase ``"halting"`` in which only the halting head learns, by the same loss, five epochs at
            1e-3. On rows that the encoder has memorised every exit is right, and lambda learns to leave at once: give
            this phase other rows, as `earlyexit train` does.

    Raises:
        ValueError: an argument out of range.

    Differences from the public code: computed in log space, without the code's constant 0.05 / L, which has no
    gradient, at layers that a row has almost surely left before. One halting head serves all layers, as in the code;
    one exit serves all layers only where the backbone shares its layers (ALBERT).

    Example:
        >>> import earlyexit_kernels as ee
        >>> ee.methods.Palbert(beta=1).head_changes(shares_layers=False)["halting_layers"]
        3
    """

    beta: float = 0.5
    prior: float | None = None
    kl: str = "prior_posterior"
    close_tail: bool = True
    halting_input: str = "concat"
    halting_layers: int = 3
    halting_phase: bool = False
    name: ClassVar[str] = "palbert"
    rule: ClassVar[str] = "q_exit"
    halting_weight_decay: ClassVar[bool] = False
    checks: ClassVar[Mapping[str, Check]] = {
        "beta": number(low=0.0),
        "prior": optional(number(low=0.0, high=1.0, inside=True)),
        "kl": choice("prior_posterior", "posterior_prior"),
        "close_tail": flag,
        "halting_input": choice("concat", "diff", "single"),
        "halting_layers": whole(low=1),
        "halting_phase": flag,
    }

    @property
    def phases(self) -> tuple[PhaseSpec, ...]:
        ponder = PhaseSpec(name="ponder", epochs=25.0, lr=1e-5)
        halting = PhaseSpec(name="halting", trains=frozenset({"halting"}), epochs=5.0, lr=1e-3, other_rows=True)
        return (ponder, halting) if self.halting_phase else (ponder,)

    def at_depth(self, depth: int) -> Palbert:
        return self if self.prior is not None else dataclasses.replace(self, prior=scaled_prior(depth))

    def head_changes(self, shares_layers: bool) -> dict[str, Any]:
        return {
            "halting": True,
            "halting_input": self.halting_input,
            "halting_layers": self.halting_layers,
            "halting_shared": True,
            "shared_exit": shares_layers,
        }

    def loss(self, trace: ExitTrace, labels: Tensor | None, step: TrainingStep) -> Tensor:
        # the second phase trains the halting head alone
        logits = trace.logits if step.phase == 0 else trace.logits.detach()
        losses = exit_losses(logits, labels, step.problem_type)
        log_q = log_posterior(self.aux(trace, "halting"), close_tail=self.close_tail)
        prior = scaled_prior(trace.depth) if self.prior is None else self.prior
        log_g = log_prior(prior, trace.depth).to(log_q)
        if self.kl == "prior_posterior":
            divergence = (log_g.exp() * (log_g - log_q)).sum(dim=1)
        else:
            divergence = (log_q.exp() * (log_q - log_g)).sum(dim=1)
        expected = (log_q.exp() * losses).sum(dim=1)
        rows = labelled(labels, step.problem_type, trace.logits)
        return row_mean(expected + self.beta * divergence, rows)


def log_posterior(s: Tensor, *, close_tail: bool) -> Tensor:
    """Return log q ``[N, L]`` for halting logits ``[N, L]``; see `Palbert` for `close_tail`."""
    stay = F.logsigmoid(-s).cumsum(dim=1)
    before = torch.cat((torch.zeros_like(stay[:, :1]), stay[:, :-1]), dim=1)
    leave = F.logsigmoid(s)
    if close_tail:
        leave = torch.cat((leave[:, :-1], torch.zeros_like(leave[:, -1:])), dim=1)
    return before + leave


def scaled_prior(depth: int) -> float:
    """Return lambda_p with which the last of `depth` layers has the prior mass of the paper's twelfth."""
    return -math.expm1((PAPER_DEPTH - 1) / max(depth - 1, 1) * math.log1p(-PAPER_PRIOR))


def log_prior(prior: float, depth: int) -> Tensor:
    """Return log g ``[L]`` float64 of the geometric prior, whose last layer has the remaining mass."""
    log_g = torch.arange(depth, dtype=torch.float64) * math.log1p(-prior)
    log_g[:-1] += math.log(prior)
    return log_g
