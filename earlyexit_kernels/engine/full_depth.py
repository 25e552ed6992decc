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

from earlyexit_kernels.engine.layer_calls import RequestRows, layer_calls
from earlyexit_kernels.engine.packing import PackedBatch
from earlyexit_kernels.engine.states import PackedStates
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
    hidden: Tensor,
    batch: PackedBatch,
    layers: Sequence[Callable[..., Any]],
    heads: ExitHeads,
    options: TraceOptions,
    keys: Tensor | None = None,
    norm: Callable[[Tensor], Tensor] | None = None,
    request: RequestRows | None = None,
) -> ExitTrace:
    """Run a packed batch through all layers and exits, differentiable where gradients are enabled.

    Args:
        hidden: ``[1, T, H]`` after the embeddings.
        batch: its rows, all of them live.
        layers: L callables ``layer(hidden, plan=...)``.
        heads: their exits.
        options: what to compute besides logits.
        keys: ``[N]`` int64, stored in the trace.
        norm: through which exits and gates read the tokens, or None.
        request: what the layers need to know about the request, or None.
    """
    calls = layer_calls(batch, hidden, request)
    states = PackedStates(hidden[0], batch.offsets, calls.plan, norm)
    memory = heads.first_memory(states, options.needs)
    outputs: list[HeadOutput] = []
    gates: list[Tensor] = []
    projections: list[Tensor] = []
    for layer, run_layer in enumerate(layers, start=1):
        before, above = states, len(layers) - layer
        own = states = before._replace(hidden=calls.run(layer, run_layer, before.hidden[None])[0])
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
        batch.offsets if projections else None,
    )


def mixed_by_gate(before: PackedStates, after: PackedStates, gate: Tensor, gating: Gating) -> PackedStates:
    """Return the output of a layer mixed with its input by the gate logits ``[B]`` of the rows."""
    g = torch.sigmoid(gate)
    if gating.hard:
        g = g + ((g >= gating.threshold).to(g) - g).detach()
    tokens = after.hidden.shape[0]
    by_token = g.repeat_interleave(before.offsets.diff(), output_size=tokens)[:, None].to(after.hidden.dtype)
    return after._replace(hidden=(1 - by_token) * after.hidden + by_token * before.hidden)


def balanced(read: PackedStates, states: PackedStates, above: int) -> tuple[PackedStates, PackedStates]:
    """Average the gradients that a layer receives from the exit that reads `read` and from the `above` later exits."""
    return (
        read._replace(hidden=GradientScale.apply(read.hidden, 1 / (above + 1))),
        states._replace(hidden=GradientScale.apply(states.hidden, above / (above + 1))),
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
