"""The eager loop: layer, exit, compaction. It contains no criterion, model family or device code.

    hidden -> [ gate? -> layer -> exit head -> exit_step -> compact? ] x L -> answers, in request order

After each layer the host knows three numbers: live rows, their tokens, and rows with invalid logits. On the CPU it
reads them at once. On CUDA they arrive a layer late as upper bounds (`counts`), and the loop does not wait for the
layer that it has just launched: rows leave and move on the device, into buffers as large as the bound. With skip gates
the host has to know which rows run a layer, so it reads all numbers at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from earlyexit_kernels.criteria import Criterion, resolve_backend
from earlyexit_kernels.engine.counts import Counts, counts_for
from earlyexit_kernels.engine.exits import ExitSource, RequestExits, exit_source
from earlyexit_kernels.engine.invalid import refuse_invalid
from earlyexit_kernels.engine.layer_calls import LayerCalls, RequestRows, layer_calls
from earlyexit_kernels.engine.packing import PackedBatch, compact_batch, scatter_rows
from earlyexit_kernels.engine.states import PackedStates
from earlyexit_kernels.heads import ExitHeads
from earlyexit_kernels.ops import bare_op
from earlyexit_kernels.types import Answers, ExitOutput

COMPACTIONS = ("auto", "always", "never")


class CompactionCost(NamedTuple):
    """What a compaction costs, in multiply-adds of a layer's matrix products.

    Attributes:
        value: of moving one hidden value.
        fixed: of the three ops and the new attention plan.
    """

    value: int
    fixed: int


#: Kind of device -> the cost there. That of the CPU was measured on two cores of an AVX-512 server by the suite
#: `compaction_cost`, whose records are in benchmarks/results and whose code is in commit dca2a94. That of CUDA is an
#: estimate, for 2.5e14 multiply-adds a second: 4 bytes a value at 4 TB/s, and 80 microseconds of the host.
COMPACTION_COSTS = {"cpu": CompactionCost(60, 10_000_000), "cuda": CompactionCost(250, 20_000_000_000)}


@dataclass(frozen=True)
class RunOptions:
    """How a batch is run.

    Attributes:
        backend: of the ops, ``"auto"`` or a name. A registered rule can limit that of the exits.
        compaction: ``"auto"`` compacts when that pays, ``"always"`` at every exit, ``"never"``.
        strict: raise on invalid logits.
        layer_macs: multiply-adds of one layer per token.
    """

    backend: str = "auto"
    compaction: str = "auto"
    strict: bool = False
    layer_macs: int = 0

    def __post_init__(self) -> None:
        if self.compaction not in COMPACTIONS:
            raise ValueError(f"compaction: expected one of {COMPACTIONS}, got {self.compaction!r}")


@dataclass
class LiveBatch:
    """The rows of the batch at a layer; rows that have left have row id -1 until the next compaction.

    Attributes:
        batch, hidden, calls: the rows, their tokens ``[1, T, H]``, and how layers are called on them.
        live, live_tokens: number of live rows and of their tokens; on CUDA upper bounds.
        norm: through which exits and gates read the tokens, or None.
    """

    batch: PackedBatch
    hidden: Tensor
    calls: LayerCalls
    live: int
    live_tokens: int
    norm: Callable[[Tensor], Tensor] | None

    @property
    def states(self) -> PackedStates:
        return PackedStates(self.hidden[0], self.batch.offsets, self.calls.plan, self.norm)


def compaction_pays(present: int, live: int, width: int, layer_macs: int, device: torch.device) -> bool:
    """Return whether moving the live tokens costs less than running the other ones through one more layer.

    Args:
        present, live: numbers of tokens.
        width: H.
        layer_macs: multiply-adds of a layer per token.
        device: of the tokens; one of another kind has the costs of the CPU.
    """
    cost = COMPACTION_COSTS.get(device.type, COMPACTION_COSTS["cpu"])
    return (present - live) * layer_macs > live * width * cost.value + cost.fixed


@dataclass(frozen=True)
class _Exits:
    """The exits of one request in the eager loop.

    Attributes:
        request: the rule and the tensors that it fills.
        source: computes the inputs of a decision.
        decide: the bare op `exit_step`.
        counts: what the host knows of the live rows.
        strict: raise on invalid logits.
    """

    request: RequestExits
    source: ExitSource
    decide: Callable[..., Tensor]
    counts: Counts
    strict: bool

    def step(self, layer: int, rows: LiveBatch) -> None:
        """Compute the exit after 1-based `layer` if it is due, and let rows leave."""
        counts = None
        if self.request.rule.is_due(layer, self.request.depth):
            batch = rows.batch
            inputs = self.source(layer, rows.states, batch.row_ids)
            counts = self.decide(*self.request.call(layer, inputs, batch.row_ids, batch.offsets))
        rows.live, rows.live_tokens = self.counts.after(layer, counts, (rows.live, rows.live_tokens))
        if self.strict:
            refuse_invalid(self.counts.invalid)

    def finish(self) -> tuple[int, ...]:
        """Return for each layer the number of present rows with invalid logits."""
        invalid = tuple(self.counts.finish())
        if self.strict:
            refuse_invalid(invalid)
        return invalid


@dataclass
class Pass:
    """One packed batch on its way through the layers; `start` makes it, and `run` or `parts` takes it to the end.

    Attributes:
        layers, heads: L layers and their exits.
        options: how the batch is run.
        skip_from: of the criterion.
        live, exits: the rows, and what has become of them.
        layers_run: ``[N]`` int64, or None where no layer can be skipped.
        request: what the layers need to know about the request, or None.
    """

    layers: Sequence[Callable[..., Any]]
    heads: ExitHeads
    options: RunOptions
    skip_from: float | None
    live: LiveBatch
    exits: _Exits
    layers_run: Tensor | None
    request: RequestRows | None

    def run(self) -> ExitOutput:
        """Return the answers of all rows.

        Raises:
            InvalidLogitsError: invalid logits, with `options.strict`.
        """
        for _ in self._layers_done():
            pass
        return self._output()

    def parts(self) -> Generator[Answers, None, ExitOutput]:
        """Yield the answers of the rows that leave at a layer, before the next layer runs; return those of all rows.

        Finding these rows reads from the device once a layer, for which CUDA has to finish its work.

        Raises:
            InvalidLogitsError: invalid logits, with `options.strict`.
        """
        request = self.exits.request
        for layer in self._layers_done():
            rows = (request.exit_layer == layer).nonzero()[:, 0]
            if rows.shape[0]:
                yield Answers(rows, request.answers[rows], request.exit_layer[rows])
        return self._output()

    def _layers_done(self) -> Iterator[int]:
        """Run the layers as long as rows are live; yield the number of each after its exit."""
        live, exits, skips, depth = self.live, self.exits, self.skip_from, len(self.layers)
        for layer, run_layer in enumerate(self.layers, start=1):
            runs = None if skips is None else _rows_that_run(self.heads, layer, live, skips)
            if self.layers_run is not None:
                ids = live.batch.row_ids
                self.layers_run[ids[ids >= 0 if runs is None else runs].long()] += 1
            if runs is None:
                live.hidden = live.calls.run(layer, run_layer, live.hidden)
                exits.step(layer, live)
            else:
                _run_in_part(layer, run_layer, live, runs, exits, self.options.backend, self.request)
            yield layer
            if live.live == 0 or layer == depth:
                break
            if live.live < live.batch.row_ids.shape[0] and _compacts(live, self.options):
                live.batch, live.hidden, _ = compact_batch(
                    live.batch, live.hidden, live.live, live.live_tokens, self.options.backend
                )
                live.calls = layer_calls(live.batch, live.hidden, self.request)

    def _output(self) -> ExitOutput:
        invalid, request = self.exits.finish(), self.exits.request
        layers_run = request.exit_layer.clone() if self.layers_run is None else self.layers_run
        return ExitOutput(request.answers, request.exit_layer, layers_run, invalid)


def start(
    hidden: Tensor,
    batch: PackedBatch,
    layers: Sequence[Callable[..., Any]],
    heads: ExitHeads,
    criterion: Criterion,
    classes: int,
    options: RunOptions,
    keys: Tensor | None = None,
    norm: Callable[[Tensor], Tensor] | None = None,
    request: RequestRows | None = None,
) -> Pass:
    """Return the pass of a packed batch before layer 1.

    Args:
        hidden: ``[1, T, H]`` after the embeddings.
        batch: its rows, at least one.
        layers: L callables ``layer(hidden, plan=...)``.
        heads: their exits.
        criterion: decides which rows leave, and which layers they skip.
        classes: C.
        options: how the batch is run.
        keys: ``[N]`` int64, for rules with `uses_keys`.
        norm: through which exits and gates read the tokens, or None.
        request: what the layers need to know about the request, or None.
    """
    skips, rule, device, rows = criterion.skip_from, criterion.exit_rule, hidden.device, batch.row_ids.shape[0]
    live = LiveBatch(batch, hidden, layer_calls(batch, hidden, request), rows, hidden.shape[1], norm)
    exits = _Exits(
        RequestExits.new(rule, rows=rows, classes=classes, depth=len(layers), device=device, keys=keys),
        exit_source(heads, rule.needs, live.states, options.backend),
        bare_op("exit_step", resolve_backend(rule.name, options.backend, device), device),
        counts_for(len(layers), device, exact=skips is not None),
        options.strict,
    )
    layers_run = None if skips is None else torch.zeros_like(exits.request.exit_layer)
    return Pass(layers, heads, options, skips, live, exits, layers_run, request)


def _rows_that_run(heads: ExitHeads, layer: int, rows: LiveBatch, skip_from: float) -> Tensor | None:
    """Return which rows run the layer, ``[B]`` bool: live rows whose gate value is below the threshold, or NaN.

    Returns None if every live row does.
    """
    gate = torch.sigmoid(heads.gate(layer, rows.states).float())
    live = rows.batch.row_ids >= 0
    runs = live & ~(gate >= skip_from)
    return None if bool(torch.equal(runs, live)) else runs


def _run_in_part(
    layer: int,
    run_layer: Callable[..., Any],
    rows: LiveBatch,
    runs: Tensor,
    exits: _Exits,
    backend: str,
    request: RequestRows | None,
) -> None:
    """Run one layer on the rows `runs`; the other rows keep their hidden states and skip the exit, except the last one.

    A row that skips the last layer is answered by the last exit from the hidden state that it has.
    """
    batch, last = rows.batch, layer == exits.request.depth
    lengths = batch.offsets.diff()
    count, tokens = torch.stack((runs.sum(), lengths[runs].sum())).tolist()
    if count:
        chosen = dataclasses.replace(batch, tokens=None, row_ids=torch.where(runs, batch.row_ids, -1))
        part_batch, hidden, source = compact_batch(chosen, rows.hidden, count, tokens, backend)
        calls = layer_calls(part_batch, hidden, request)
        part = LiveBatch(part_batch, calls.run(layer, run_layer, hidden), calls, count, tokens, rows.norm)
        if not last:
            exits.step(layer, part)
        scatter_rows(part.batch, part.hidden, source, batch, rows.hidden, backend)
        rows.live -= count - part.live
        rows.live_tokens -= tokens - part.live_tokens
    if last:
        exits.step(layer, rows)


def _compacts(rows: LiveBatch, options: RunOptions) -> bool:
    if options.compaction == "auto":
        _, tokens, width = rows.hidden.shape
        return compaction_pays(tokens, rows.live_tokens, width, options.layer_macs, rows.hidden.device)
    return options.compaction == "always"
