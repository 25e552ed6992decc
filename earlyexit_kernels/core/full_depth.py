"""The full-depth pass: every layer on every row, all exits kept. Training and traces run it.

When gates are trained, the output of a layer is mixed with its input by the gate value g of the row,
``h = (1 - g) F(h) + g h``, with g itself or with g rounded in the forward pass only (straight-through). An exit before
the last reads the layer's own output F(h), the last one reads the mixture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from earlyexit_kernels.core.rows import Rows
from earlyexit_kernels.heads import ExitHeads, HeadOutput
from earlyexit_kernels.types import ExitTrace, Gating


@dataclass(frozen=True)
class TraceOptions:
    """What a full-depth pass computes besides logits.

    Attributes:
        needs: scalars to keep: ``"all"``, or those that are trained (``"halting"``).
        gating: how gates mix, or None to run without gates.
        projections: which token projections to keep, of the ``"inputs"`` of layers or of ``"exits"``, or None.
        balances: in the backward pass, a layer and its gate receive the mean instead of the sum of the gradients of the
            exits at and above it. The forward pass does not change.
    """

    needs: str = "all"
    gating: Gating | None = None
    projections: str | None = None
    balances: bool = False


def trace_exits(
    rows: Rows,
    layers: Sequence[Callable[..., Any]],
    heads: ExitHeads,
    options: TraceOptions,
    keys: Tensor | None = None,
) -> ExitTrace:
    """Run a packed batch through all layers and exits, differentiable where gradients are enabled.

    Args:
        rows: after the embeddings, all of them live.
        layers: L callables ``layer(hidden, plan=...)``.
        heads: their exits.
        options: what to compute besides logits.
        keys: ``[N]`` int64, stored in the trace.
    """
    states, calls = rows, rows.calls
    memory = heads.first_memory(states, options.needs)
    outputs: list[HeadOutput] = []
    gates: list[Tensor] = []
    projections: list[Tensor] = []
    for layer, run_layer in enumerate(layers, start=1):
        before, above = states, len(layers) - layer
        own = states = before.with_hidden(calls.run(layer, run_layer, before.hidden[None])[0])
        if options.gating is not None:
            gates.append(heads.gate(layer, before))
            states = mixed_by_gate(before, own, gates[-1], options.gating)
        if options.projections == "inputs":
            projections.append(heads.project(layer, before))
        read = own if above else states
        if options.balances:
            read, states = balanced(read, states, above)
        projects = options.projections == "exits" and above > 0
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
        rows.offsets if projections else None,
    )


def mixed_by_gate(before: Rows, after: Rows, gate: Tensor, gating: Gating) -> Rows:
    """Return the output of a layer mixed with its input by the gate logits ``[B]`` of the rows."""
    g = torch.sigmoid(gate)
    if gating.hard:
        g = g + ((g >= gating.threshold).to(g) - g).detach()
    tokens = after.hidden.shape[0]
    by_token = g.repeat_interleave(before.offsets.diff(), output_size=tokens)[:, None].to(after.hidden.dtype)
    return after.with_hidden((1 - by_token) * after.hidden + by_token * before.hidden)


def balanced(read: Rows, states: Rows, above: int) -> tuple[Rows, Rows]:
    """Average the gradients that a layer receives from the exit that reads `read` and from the `above` later exits."""
    return (
        read.with_hidden(GradientScale.apply(read.hidden, 1 / (above + 1))),
        states.with_hidden(GradientScale.apply(states.hidden, above / (above + 1))),
    )


class GradientScale(torch.autograd.Function):
    """Identity whose gradient is scaled."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        """Return `x`."""
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return the scaled gradient of `x`."""
        return gradients[0] * ctx.scale, None
