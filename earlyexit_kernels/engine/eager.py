"""The loop: layer, exit, compaction. It knows no paper, no model family and no device code.

    hidden -> [ gate? -> layer -> exit head -> exit_step -> compact? ] x L -> answers, in request order

What the host knows of a layer are three numbers: rows live, their tokens, rows without a meaningful answer. On the CPU
it reads them at once. On CUDA they come a layer late (`counts`), as upper bounds, and the loop asks for nothing: rows
leave and are moved on the device, into room for as many as the bound says. A gate has the host read which rows run the
layer, so with one it reads everything at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from earlyexit_kernels.criteria import Criterion
from earlyexit_kernels.engine.counts import Counts, counts_for
from earlyexit_kernels.engine.full_depth import first
from earlyexit_kernels.engine.packing import AttentionPlan, PackedBatch, PackedStates, plan_attention, put_back, shrink
from earlyexit_kernels.errors import InvalidLogitsError
from earlyexit_kernels.heads import ExitHeads
from earlyexit_kernels.ops import exit_step_op
from earlyexit_kernels.types import ExitOutput, read_aux

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
        strict: raise on logits without a meaning.
        layer_macs: multiply-adds of one layer on one token.
    """

    backend: str = "auto"
    compaction: str = "auto"
    strict: bool = False
    layer_macs: int = 0

    def __post_init__(self) -> None:
        if self.compaction not in COMPACTIONS:
            raise ValueError(f"compaction: expected one of {COMPACTIONS}, got {self.compaction!r}")


@dataclass
class Present:
    """The rows in the batch at a layer: some may have left, their row id is -1.

    Attributes:
        batch, hidden, plan: the rows, their tokens ``[1, T, H]``, the attention over them.
        live, live_tokens: how many rows haven't left, and their tokens; on CUDA, how many at most.
    """

    batch: PackedBatch
    hidden: Tensor
    plan: AttentionPlan
    live: int
    live_tokens: int

    @property
    def states(self) -> PackedStates:
        return PackedStates(self.hidden[0], self.batch.offsets, self.plan)


def compaction_pays(present: int, live: int, width: int, layer_macs: int) -> bool:
    """Whether moving the live tokens costs less than carrying the others through one more layer.

    Args:
        present, live: tokens.
        width: H.
        layer_macs: multiply-adds of a layer on one token.
    """
    return (present - live) * layer_macs > live * width * MACS_PER_MOVED_VALUE + MACS_PER_COMPACTION


class _Exits:
    """The exits of one request: heads, rule, and what is indexed by the request's rows."""

    def __init__(
        self,
        present: Present,
        heads: ExitHeads,
        criterion: Criterion,
        classes: int,
        depth: int,
        settings: Settings,
        keys: Tensor | None,
        counts: Counts,
    ) -> None:
        rows, device = present.batch.row_ids.shape[0], present.hidden.device
        rule = self.rule = criterion.exit_rule
        self.heads, self.depth, self.strict, self.rows = heads, depth, settings.strict, rows
        self.counts = counts
        self.state = rule.new_state(rows, device, classes, keys)
        self.decide = exit_step_op(settings.backend, device.type)
        self.linear = None if rule.needs is not None else heads.linear_exits(present.hidden.dtype)
        self.answers = torch.zeros(rows, classes, dtype=torch.float32, device=device)
        self.exit_layer = torch.zeros(rows, dtype=torch.int64, device=device)
        # a last, spare row takes what rows that have left would write
        memory = {} if rule.needs is None else heads.first_memory(present.states, rule.needs)
        self.memory = {name: torch.cat((x, x.new_zeros(1, x.shape[1]))) for name, x in memory.items()}

    def step(self, layer: int, present: Present) -> None:
        """Compute the exit of 1-based `layer` where it is due, and let rows of `present` leave."""
        counts = self._decide(layer, present) if self.rule.is_due(layer, self.depth) else None
        present.live, present.live_tokens = self.counts.after(layer, counts, (present.live, present.live_tokens))
        if self.strict:
            self._refuse(self.counts.invalid)

    def finish(self) -> tuple[int, ...]:
        """For each layer, how many rows present there had logits without a meaning."""
        invalid = tuple(self.counts.finish())
        if self.strict:
            self._refuse(invalid)
        return invalid

    def _refuse(self, invalid: Sequence[int]) -> None:
        layer = next((k for k, rows in enumerate(invalid, start=1) if rows), None)
        if layer is not None:
            raise InvalidLogitsError(invalid_message(invalid[layer - 1], layer, self.depth))

    def _decide(self, layer: int, present: Present) -> Tensor:
        offsets, row_ids = present.batch.offsets, present.batch.row_ids
        aux = None
        if self.linear is not None:
            pooling, source = self.linear.pooling, (present.hidden[0], offsets, *self.linear.weights[layer - 1])
        else:
            slots = row_ids.masked_fill(row_ids < 0, self.rows).long() if self.memory else row_ids
            memory = {name: x.index_select(0, slots) for name, x in self.memory.items()}
            pooling = "none"
            features, weight, bias, aux, memory = self.heads.fused(layer, present.states, memory, self.rule.needs)
            source = (features, offsets, weight, bias)
            for name, x in memory.items():
                self.memory[name][slots] = x.to(self.memory[name].dtype)
            aux = None if aux is None or self.rule.needs is None else read_aux(aux, self.rule.needs)
        rule, memory_of_rows = self.rule, (row_ids, self.state, self.answers, self.exit_layer)
        return self.decide(
            *source, None, aux, *memory_of_rows, rule.name, rule.params(layer), pooling, layer, self.depth
        )


@torch.no_grad()
def run(
    hidden: Tensor,
    batch: PackedBatch,
    layers: Sequence[Callable[..., Any]],
    heads: ExitHeads,
    criterion: Criterion,
    classes: int,
    settings: Settings,
    keys: Tensor | None = None,
) -> ExitOutput:
    """Run a packed batch until every row has its answer.

    Args:
        hidden: ``[1, T, H]`` after the embeddings.
        batch: its rows, at least one.
        layers: L callables ``layer(hidden, None, plan=...)``.
        heads: their exits.
        criterion: who may leave, and skip, where.
        classes: C.
        settings: how.
        keys: ``[N]`` int64, for a rule that wants them.

    Raises:
        InvalidLogitsError: logits without a meaning, with `settings.strict`.
    """
    depth, skips = len(layers), criterion.skip_from
    present = Present(batch, hidden, plan_attention(batch), batch.row_ids.shape[0], hidden.shape[1])
    counts = counts_for(depth, hidden.device, exact=skips is not None)
    exits = _Exits(present, heads, criterion, classes, depth, settings, keys, counts)
    layers_run = None if skips is None else torch.zeros_like(exits.exit_layer)
    for layer, run_layer in enumerate(layers, start=1):
        runs = None if skips is None else _rows_that_run(heads, layer, present, skips)
        if layers_run is not None:
            ids = present.batch.row_ids
            layers_run[ids[ids >= 0 if runs is None else runs].long()] += 1
        if runs is None:
            present.hidden = first(run_layer(present.hidden, None, plan=present.plan))
            exits.step(layer, present)
        else:
            _split_layer(layer, run_layer, present, runs, exits, settings.backend)
        if present.live == 0 or layer == depth:
            break
        if present.live < present.batch.row_ids.shape[0] and _compacts(present, settings):
            present.batch, present.hidden, _ = shrink(
                present.batch, present.hidden, present.live, present.live_tokens, settings.backend
            )
            present.plan = plan_attention(present.batch)
    invalid = exits.finish()
    layers_run = exits.exit_layer.clone() if layers_run is None else layers_run
    return ExitOutput(exits.answers, exits.exit_layer, layers_run, invalid)


def _rows_that_run(heads: ExitHeads, layer: int, present: Present, skip_from: float) -> Tensor | None:
    """Which rows present run the layer, ``[B]`` bool: those whose gate value isn't at the threshold or above.

    None where every live row does. A gate value of NaN skips nothing.
    """
    gate = torch.sigmoid(heads.gate(layer, present.states).float())
    live = present.batch.row_ids >= 0
    runs = live & ~(gate >= skip_from)
    return None if bool(torch.equal(runs, live)) else runs


def _split_layer(
    layer: int, run_layer: Callable[..., Any], present: Present, runs: Tensor, exits: _Exits, backend: str
) -> None:
    """One layer on the rows that run it; the others keep their hidden states and meet no exit but the last.

    A row that skips the last layer is answered by the last exit from the hidden state it has.
    """
    batch, last = present.batch, layer == exits.depth
    lengths = batch.offsets.diff()
    count, tokens = torch.stack((runs.sum(), lengths[runs].sum())).tolist()
    if count:
        chosen = dataclasses.replace(batch, tokens=None, row_ids=torch.where(runs, batch.row_ids, -1))
        part_batch, hidden, source = shrink(chosen, present.hidden, count, tokens, backend)
        plan = plan_attention(part_batch)
        part = Present(part_batch, first(run_layer(hidden, None, plan=plan)), plan, count, tokens)
        if not last:
            exits.step(layer, part)
        put_back(part.batch, part.hidden, source, batch, present.hidden, backend)
        present.live -= count - part.live
        present.live_tokens -= tokens - part.live_tokens
    if last:
        exits.step(layer, present)


def _compacts(present: Present, settings: Settings) -> bool:
    if settings.compaction == "auto":
        _, tokens, width = present.hidden.shape
        return compaction_pays(tokens, present.live_tokens, width, settings.layer_macs)
    return settings.compaction == "always"


def invalid_message(rows: int, layer: int, depth: int) -> str:
    """What a strict model says of logits without a meaning."""
    return (
        f"{rows} row(s) have logits without a meaning (NaN, several +inf, or all -inf) at layer {layer} of {depth}; "
        "check the weights and the input, or use strict=False to let such rows run on"
    )
