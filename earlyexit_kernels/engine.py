"""The loop: layer, exit, compaction. It knows no paper, no model family and no device code.

    hidden -> [ layer -> exit head -> exit_step -> compact? ] x L -> answers, in request order

The host reads three numbers a layer (rows live, their tokens, rows without a meaningful answer): free on the CPU, one
synchronisation a layer on CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from earlyexit_kernels.criteria import Criterion
from earlyexit_kernels.errors import InvalidLogitsError
from earlyexit_kernels.heads import ExitHeads
from earlyexit_kernels.ops import exit_step_op
from earlyexit_kernels.packing import PackedBatch, plan_attention, shrink
from earlyexit_kernels.types import AUX_ACTIVATIONS, ExitOutput, ExitTrace

COMPACTIONS = ("auto", "always", "never")

#: Moving one hidden value costs about as much as this many multiply-adds of a layer's matrix products; measured on two
#: cores of an AVX-512 server by benchmarks/end_to_end/compaction_cost.py.
MACS_PER_MOVED_VALUE = 60
#: The fixed price of a compaction (three ops, a new attention plan) in the same unit.
MACS_PER_COMPACTION = 10_000_000


@dataclass(frozen=True)
class Settings:
    """How a batch is run.

    Attributes:
        backend: of the ops, ``"auto"`` or a name.
        compaction: ``"auto"`` moves rows together when that pays, ``"always"`` at every exit, ``"never"``.
        all_exits: run every layer on every row and keep the logits of every exit.
        strict: raise on logits without a meaning.
        layer_macs: multiply-adds of one layer on one token.
    """

    backend: str = "auto"
    compaction: str = "auto"
    all_exits: bool = False
    strict: bool = False
    layer_macs: int = 0

    def __post_init__(self) -> None:
        if self.compaction not in COMPACTIONS:
            raise ValueError(f"compaction: expected one of {COMPACTIONS}, got {self.compaction!r}")


def compaction_pays(present: int, live: int, width: int, layer_macs: int) -> bool:
    """Whether moving the live tokens costs less than carrying the others through one more layer.

    Args:
        present, live: tokens.
        width: H.
        layer_macs: multiply-adds of a layer on one token.
    """
    return (present - live) * layer_macs > live * width * MACS_PER_MOVED_VALUE + MACS_PER_COMPACTION


def run(
    hidden: Tensor,
    batch: PackedBatch,
    layers: Sequence[Callable[..., Any]],
    heads: ExitHeads,
    criterion: Criterion,
    classes: int,
    settings: Settings,
) -> ExitOutput:
    """Run a packed batch until every row has its answer.

    Args:
        hidden: ``[1, T, H]`` after the embeddings.
        batch: its rows, at least one.
        layers: L callables ``layer(hidden, None, plan=...)``.
        heads: their exits.
        criterion: who may leave where.
        classes: C.
        settings: how.

    Raises:
        InvalidLogitsError: logits without a meaning, with `settings.strict`.
    """
    rows, depth, device = batch.row_ids.shape[0], len(layers), hidden.device
    state = criterion.new_state(rows, device)
    decide = exit_step_op(settings.backend, device.type)
    linear = None if settings.all_exits else heads.linear_exits(hidden.dtype)
    answers = torch.zeros(rows, classes, dtype=torch.float32, device=device)
    exit_layer = torch.zeros(rows, dtype=torch.int64, device=device)
    invalid = [0] * depth
    collected: list[tuple[Tensor, dict[str, Tensor]]] = []
    plan = plan_attention(batch, hidden.dtype)
    for layer, run_layer in enumerate(layers, start=1):
        hidden = _first(run_layer(hidden, None, plan=plan))
        due = criterion.is_due(layer, depth)
        pooling = "none"
        source: tuple[Tensor | None, ...] = (None, batch.offsets, None, None)
        aux: dict[str, Tensor] = {}
        logits: Tensor | None = None
        if settings.all_exits:
            logits, aux = heads(layer, hidden[0], batch.offsets)
            collected.append((logits, aux))
        elif due and linear is not None:
            pooling, source = linear.pooling, (hidden[0], batch.offsets, *linear.weights[layer - 1])
        elif due:
            features, weight, bias, aux = heads.fused(layer, hidden[0], batch.offsets)
            source = (features, batch.offsets, weight, bias)
        if not due:
            continue
        logits = None if logits is None else logits.detach()
        scalar = None if criterion.needs is None else read_aux(aux[criterion.needs].detach(), criterion.needs)
        memory = (batch.row_ids, state, answers, exit_layer)
        counts = decide(
            *source, logits, scalar, *memory, criterion.name, criterion.params(layer), pooling, layer, depth
        )
        live, live_tokens, invalid[layer - 1] = counts.tolist()
        if invalid[layer - 1] and settings.strict:
            raise InvalidLogitsError(_invalid_message(invalid[layer - 1], layer, depth))
        if settings.all_exits:
            continue
        if live == 0:
            break
        if live < batch.row_ids.shape[0] and _compacts(hidden.shape, live_tokens, settings):
            batch, hidden = shrink(batch, hidden, live, live_tokens, settings.backend)
            plan = plan_attention(batch, hidden.dtype)
    layers_run = torch.full_like(exit_layer, depth) if settings.all_exits else exit_layer.clone()
    return ExitOutput(answers, exit_layer, layers_run, tuple(invalid), _trace(collected))


def read_aux(raw: Tensor, name: str) -> Tensor:
    """A head's raw scalar as the number a criterion reads, float32."""
    return AUX_ACTIVATIONS[name](raw.float())


def _compacts(shape: torch.Size, live_tokens: int, settings: Settings) -> bool:
    if settings.compaction == "auto":
        return compaction_pays(shape[1], live_tokens, shape[2], settings.layer_macs)
    return settings.compaction == "always"


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _trace(collected: Sequence[tuple[Tensor, dict[str, Tensor]]]) -> ExitTrace | None:
    if not collected:
        return None
    names = collected[0][1]
    aux = {name: torch.stack([a[name] for _, a in collected], dim=1) for name in names}
    return ExitTrace(torch.stack([logits for logits, _ in collected], dim=1), aux)


def _invalid_message(rows: int, layer: int, depth: int) -> str:
    return (
        f"{rows} row(s) have logits without a meaning (NaN, several +inf, or all -inf) at layer {layer} of {depth}; "
        "check the weights and the input, or use strict=False to let such rows run on"
    )
