"""SmartBERT: train gates that skip layers, then exits on the gated layers.

SmartBERT: A Promotion of Dynamic Early Exiting Mechanism for Accelerating BERT Inference. Boren Hu, Yun Zhu, Jiacheng
Li, Siliang Tang. IJCAI 2023, arXiv 2303.09266. With g_l the probability of skipping layer l:
(1 - eta1) (L_L + lambda / sum_l mean g_l) + eta1 sum_l InfoNCE(l, l+1) for encoder, gates and last exit; then
(1 - eta2) sum_{l<L} L_l + eta2 / (L - 2) sum_l InfoNCE(l, l+1) for the early exits.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from earlyexit_kernels.arguments import Check, choice, flag, number
from earlyexit_kernels.methods.base import (
    BACKBONE,
    ENCODER,
    EXITS,
    LOOP,
    Method,
    PhaseSpec,
    TrainingStep,
    at_least_float32,
    exit_losses,
    labelled,
    row_mean,
)
from earlyexit_kernels.types import CLASSIFICATION, ExitTrace, Gating

#: Added to sum g, so that the penalty is finite if all gates are 0.
SMALLEST = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Smartbert(Method):
    """Two phases at 2e-5: ``"backbone"`` (5 epochs), then ``"exits"`` (4 epochs) with hard gates.

    For single-label classification. Exits are attention heads of width 128. The gate term reads the soft g of the rows
    of all processes, also under hard gates. The first phase contrasts the inputs of the layers (the embeddings' output
    included, h_L not), the second the features of the early exits.

    Args:
        gate_weight: lambda, at least 0, the reward of skipping; there is no target rate. Its gradient for each gate is
            lambda / (sum_l mean g_l)^2: the paper's .04 on twelve layers has the effect of about .01 on six.
        gate_bias: initial bias of the gates' logits; -1.5 is g = .18, closed gates. With 0, as in the paper, all gates
            start on the threshold .5.
        gate_penalty: ``"reciprocal"`` is lambda / sum_l mean g_l; ``"linear"`` is lambda sum_l mean (1 - g_l).
        skip_threshold: s in [0, 1]; a hard gate skips where g >= s.
        soft_epochs: epochs of the first phase in which layers are mixed by g; afterwards, and in the second phase, by
            1[g >= s] with the gradient of g. The paper has 3 of 5 epochs: a shorter phase requires fewer, or gates
            never become hard. Choose as many as the task takes to learn: while the layers do not lower the task loss,
            the reward alone moves the gates, and every layer may end skipped, for any `gate_weight` above 0.
        contrast_backbone: eta1 of the first phase, in [0, 1]; with 0 nothing is projected.
        contrast_exits: eta2 of the second phase, in [0, 1]; with 0 nothing is projected.
        temperature_backbone: of the similarities in the first phase, above 0.
        temperature_exits: of the similarities in the second phase, above 0.
        positive_backbone: whether the positive is part of its own denominator in the first phase.
        positive_exits: whether the positive is part of its own denominator in the second phase.

    Raises:
        ValueError: an argument out of range.

    Differences from the public code: a token is compared with the tokens of its own sequence only (there padding tokens
    are anchors and negatives); the mean is over the tokens of a sequence, then over sequences; the last pair of the
    second phase counts (the loop there ends before it). A sequence of one token has no negatives, and the loss 0.

    Example:
        >>> import earlyexit_kernels as ee
        >>> ee.methods.Smartbert().head_changes(shares_layers=False)["gates"]
        True
    """

    gate_weight: float = 0.04
    gate_bias: float = -1.5
    gate_penalty: str = "reciprocal"
    skip_threshold: float = 0.5
    soft_epochs: float = 3.0
    contrast_backbone: float = 0.01
    contrast_exits: float = 0.05
    temperature_backbone: float = 0.5
    temperature_exits: float = 0.55
    positive_backbone: bool = True
    positive_exits: bool = False
    name: ClassVar[str] = "smartbert"
    tasks: ClassVar[frozenset[str]] = CLASSIFICATION
    rule: ClassVar[str] = "skip_gate"
    when_missing: ClassVar[Mapping[str, Any]] = {"gate_bias": 0.0}
    checks: ClassVar[Mapping[str, Check]] = {
        "gate_weight": number(low=0.0),
        "gate_bias": number(),
        "gate_penalty": choice("reciprocal", "linear"),
        "skip_threshold": number(low=0.0, high=1.0),
        "soft_epochs": number(low=0.0),
        "contrast_backbone": number(low=0.0, high=1.0),
        "contrast_exits": number(low=0.0, high=1.0),
        "temperature_backbone": number(low=0.0, inside=True),
        "temperature_exits": number(low=0.0, inside=True),
        "positive_backbone": flag,
        "positive_exits": flag,
    }

    @property
    def phases(self) -> tuple[PhaseSpec, ...]:
        return (
            PhaseSpec(
                name="backbone",
                trains=ENCODER | {"gates", "projectors"},
                epochs=5.0,
                projections="inputs" if self.contrast_backbone > 0 else None,
            ),
            PhaseSpec(
                name="exits",
                trains=frozenset({"early_exits"}),
                epochs=4.0,
                projections="exits" if self.contrast_exits > 0 else None,
            ),
        )

    def head_changes(self, shares_layers: bool) -> dict[str, Any]:
        contrast = self.contrast_backbone > 0 or self.contrast_exits > 0
        form = {"form": "attention", "width": 128, "attention_heads": 4}
        return {**form, "gates": True, "gate_bias": self.gate_bias, "contrast": contrast}

    def answering(self) -> dict[str, Any] | None:
        return {"name": "skip_gate", "threshold": self.skip_threshold, "exit": {"name": "full_depth"}}

    def gating(self, step: TrainingStep) -> Gating | None:
        hard = Gating(True, self.skip_threshold)
        if step.phase == EXITS or self.soft_epochs == 0:
            return hard
        if step.epoch is None:
            raise ValueError(
                f"Smartbert(soft_epochs={self.soft_epochs:g}) needs the number of epochs done, got None; "
                f"{LOOP}, which counts them"
            )
        return hard if step.epoch >= self.soft_epochs else hard._replace(hard=False)

    def loss(self, trace: ExitTrace, labels: Tensor | None, step: TrainingStep) -> Tensor:
        rows = labelled(labels, step.problem_type, trace.logits)
        if step.phase == BACKBONE:
            last = row_mean(exit_losses(trace.logits[:, -1:], labels, step.problem_type)[:, 0], rows)
            right = last + self._gate_term(self.aux(trace, "gate").sigmoid(), rows)
            weight, temperature, positive = self.contrast_backbone, self.temperature_backbone, self.positive_backbone
        else:
            right = row_mean(exit_losses(trace.logits[:, :-1], labels, step.problem_type).sum(dim=1), rows)
            weight, temperature, positive = self.contrast_exits, self.temperature_exits, self.positive_exits
        if weight == 0:
            return right
        pairs = contrasts(trace, temperature=temperature, positive=positive)
        pairs = pairs.sum(dim=1) if step.phase == BACKBONE else pairs.sum(dim=1) / max(trace.depth - 2, 1)
        return (1 - weight) * right + weight * row_mean(pairs, rows)

    def _gate_term(self, g: Tensor, rows: Tensor) -> Tensor:
        # the last column is 0 where no row counts, and then the loss is 0
        *means, counts = row_mean(F.pad(g, (0, 1), value=1.0), rows, everywhere=True)
        mean = torch.stack(means)
        term = (1 - mean).sum() if self.gate_penalty == "linear" else 1 / (mean.sum() + SMALLEST)
        return self.gate_weight * counts * term


def contrasts(trace: ExitTrace, *, temperature: float, positive: bool) -> Tensor:
    """Return the InfoNCE loss of successive projections within each sequence, ``[N, M - 1]``, the mean over tokens.

    The positive of token t of projection m is token t of projection m + 1; the negatives are the other tokens of the
    sequence. Similarities are cosines.

    Args:
        trace: projections ``[M, T, P]`` and offsets ``[N + 1]``.
        temperature: of the cosines.
        positive: whether the positive is part of its own denominator.

    Raises:
        ValueError: the trace has no projections.
    """
    if trace.projections is None or trace.offsets is None:
        raise ValueError(
            "method 'smartbert' reads token projections, and the trace has none; train it phase by phase, so that the "
            "model computes those of the phase"
        )
    starts, lengths = trace.offsets[:-1].long(), trace.offsets.diff().long()
    longest = int(lengths.max()) if len(lengths) else 0
    at = torch.arange(longest, device=lengths.device)
    real = at < lengths[:, None]
    tokens = F.normalize(at_least_float32(trace.projections), dim=-1)[:, torch.where(real, starts[:, None] + at, 0)]
    allowed = real[:, None, :] if positive else real[:, None, :] & (at[:, None] != at)
    found = [_info_nce(a, b, allowed, temperature) for a, b in itertools.pairwise(tokens)]
    if not found:
        return tokens.new_zeros(len(lengths), 0)
    counts = real if positive else real & (lengths > 1)[:, None]
    losses = torch.stack(found, dim=1).masked_fill(~counts[:, None], 0.0)
    return losses.sum(dim=2) / lengths[:, None]


def _info_nce(a: Tensor, b: Tensor, allowed: Tensor, temperature: float) -> Tensor:
    """Return the loss ``[N, S]`` of each token t of `a` ``[N, S, P]``: -log of the share of token t of `b`."""
    scores = a @ b.transpose(1, 2) / temperature
    # a finite minimum: a row without allowed tokens would have NaN gradients
    others = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).logsumexp(dim=2)
    return others - scores.diagonal(dim1=1, dim2=2)
