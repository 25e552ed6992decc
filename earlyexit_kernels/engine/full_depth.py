"""The full-depth pass: every layer on every row, every exit kept. Training and traces run it.

Where gates train, a layer's output is mixed with its input by the row's gate value g: ``h = (1 - g) F(h) + g h``, soft,
or with g rounded in the forward pass and its own gradient in the backward one. An exit before the last reads the
layer's own output F(h), the last one the mixture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from earlyexit_kernels.engine.packing import PackedBatch, PackedStates, plan_attention
from earlyexit_kernels.heads import ExitHeads, HeadOutput
from earlyexit_kernels.types import ExitTrace, Gating


@dataclass(frozen=True)
class Collect:
    """What a full-depth pass keeps beside logits.

    Attributes:
        needs: scalars to keep: ``"all"`` there are, or those that learn (``"halting"``).
        gating: how gates mix, or None to run without them.
        projections: ``"inputs"`` or ``"exits"``: which token projections to keep, or None.
        balances: in the backward pass, a layer and its gate receive the average of the gradients of the exits at and
            above it. The forward pass is the same.
    """

    needs: str = "all"
    gating: Gating | None = None
    projections: str | None = None
    balances: bool = False


def trace_exits(
    hidden: Tensor,
    batch: PackedBatch,
    layers: Sequence[Callable[..., Any]],
    heads: ExitHeads,
    collect: Collect,
    keys: Tensor | None = None,
) -> ExitTrace:
    """Run a packed batch through all layers and exits, differentiable where gradients are enabled.

    Args:
        hidden: ``[1, T, H]`` after the embeddings.
        batch: its rows, all of them present.
        layers: L callables ``layer(hidden, None, plan=...)``.
        heads: their exits.
        collect: what to keep.
        keys: ``[N]`` int64 for the trace.
    """
    plan = plan_attention(batch)
    states = PackedStates(hidden[0], batch.offsets, plan)
    memory = heads.first_memory(states, collect.needs)
    outputs: list[HeadOutput] = []
    gates: list[Tensor] = []
    projections: list[Tensor] = []
    for layer, run_layer in enumerate(layers, start=1):
        before = states
        states = own = PackedStates(first(run_layer(before.hidden[None], None, plan=plan))[0], batch.offsets, plan)
        if collect.gating is not None:
            gates.append(heads.gate(layer, before))
            states = own._replace(hidden=mixed(before, own.hidden, gates[-1], collect.gating))
        if collect.projections == "inputs":
            projections.append(heads.project(layer, before))
        above = len(layers) - layer
        read = states if above == 0 else own
        if collect.balances:
            read = read._replace(hidden=GradientScale.apply(read.hidden, 1 / (above + 1)))
            states = states._replace(hidden=GradientScale.apply(states.hidden, above / (above + 1)))
        projects = collect.projections == "exits" and above > 0
        outputs.append(heads(layer, read, memory, projects=projects))
        memory = outputs[-1].memory
    projections += [o.projection for o in outputs if o.projection is not None]
    aux = {name: torch.stack([o.aux[name] for o in outputs], dim=1) for name in outputs[0].aux}
    if gates:
        aux["gate"] = torch.stack(gates, dim=1)
    return ExitTrace(
        torch.stack([o.logits for o in outputs], dim=1),
        aux,
        keys,
        torch.stack(projections) if projections else None,
        batch.offsets if projections else None,
    )


class GradientScale(torch.autograd.Function):
    """The identity, whose gradient is scaled."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        """`x` as it is."""
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The gradient of `x`."""
        return gradients[0] * ctx.scale, None


def mixed(before: PackedStates, after: Tensor, gate: Tensor, gating: Gating) -> Tensor:
    """A layer's output ``[T, H]`` mixed with its input by the gate's logits ``[B]``; rows share theirs."""
    g = torch.sigmoid(gate)
    if gating.hard:
        g = g + ((g >= gating.threshold).to(g) - g).detach()
    by_token = g.repeat_interleave(before.offsets.diff(), output_size=after.shape[0])[:, None].to(after.dtype)
    return (1 - by_token) * after + by_token * before.hidden


def first(output: Any) -> Tensor:
    """The hidden states out of what a family's layer returns."""
    return output[0] if isinstance(output, tuple) else output
