"""The loop. It contains no criterion, model family or device code.

    hidden -> [ gate? -> layer -> exit head -> exit_step -> compact? ] x L -> answers, in request order

After each layer the host knows three numbers: live rows, their tokens, and rows with invalid logits. On the CPU it
reads them at once. On CUDA they arrive a layer late as upper bounds (`counts`), and the loop does not wait for the
layer that it has just launched: rows leave and move on the device, into buffers as large as the bound. With skip gates
the host has to know which rows run a layer, so it reads all numbers at once.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from earlyexit_kernels.core.counts import counts_for
from earlyexit_kernels.core.encoder import Encoder
from earlyexit_kernels.core.exits import RequestExits, exit_source
from earlyexit_kernels.core.invalid import refuse_invalid
from earlyexit_kernels.core.rows import Rows, embedded
from earlyexit_kernels.core.view import Inputs, View
from earlyexit_kernels.ops import raw
from earlyexit_kernels.types import Answers, ExitOutput


class CompactionCost(NamedTuple):
    """What a compaction costs, in multiply-adds of a layer's matrix products.

    Attributes:
        value: of moving one hidden value.
        fixed: of the three ops and the new attention plan.
    """

    value: int
    fixed: int


#: Kind of device -> the cost there. That of the CPU was measured on two cores of an AVX-512 server by the suite
#: `compaction_cost`, whose code and records are in commit dca2a94. That of CUDA is an
#: estimate, for 2.5e14 multiply-adds a second: 4 bytes a value at 4 TB/s, and 80 microseconds of the host.
COMPACTION_COSTS = {"cpu": CompactionCost(60, 10_000_000), "cuda": CompactionCost(250, 20_000_000_000)}


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


class Place(Protocol):
    """Where the rows of a batch are, and when live rows are moved together."""

    def put(self, rows: Rows) -> Rows:
        """Return rows at the place where layers run on them."""

    def pays(self, rows: Rows, layers_left: int) -> bool:
        """Return whether to move the live rows together before the next layer."""

    def close(self) -> None:
        """Give the place back; called once, after the last layer."""


class InPlace(NamedTuple):
    """Leaves rows where they are; `view` is of their model."""

    view: View

    def put(self, rows: Rows) -> Rows:
        """Return the rows as they are."""
        return rows

    def pays(self, rows: Rows, layers_left: int) -> bool:
        """Return whether moving the live rows together costs less than it saves in the next layer."""
        if self.view.settings.compaction == "auto":
            tokens, width = rows.hidden.shape
            return compaction_pays(tokens, rows.live_tokens, width, self.view.layer_macs, rows.hidden.device)
        return self.view.settings.compaction == "always"

    def close(self) -> None:
        """Do nothing."""


class Pass:
    """A batch before layer 1, which `run` or `parts` takes through the layers.

    Args:
        view: of the model.
        encoder: embeds the tokens, and runs on them.
        inputs: checked; at least one row.
        place: of the rows. Default: where they are.
    """

    def __init__(self, view: View, encoder: Encoder, inputs: Inputs, place: Place | None = None) -> None:
        rule = view.criterion.exit_rule
        self.view, self.encoder, self.skip_from = view, encoder, view.criterion.skip_from
        self.place: Place = InPlace(view) if place is None else place
        try:
            rows, keys = embedded(view, inputs, encoder.embed, with_keys=rule.uses_keys)
            self.rows, depth, device = self.place.put(rows), len(encoder.layers), rows.hidden.device
            self.exits = RequestExits.new(
                rule, rows=rows.live, classes=view.classes, depth=depth, device=device, keys=keys
            )
            self.source = exit_source(view.heads, rule.needs, self.rows, view.backend)
            self.decide = raw("exit_step", view.exit_backend, device)
            self.counts = counts_for(depth, device, exact=self.skip_from is not None)
        except BaseException:
            self.place.close()
            raise
        self.layers_run = None if self.skip_from is None else torch.zeros_like(self.exits.exit_layer)

    def run(self) -> ExitOutput:
        """Return the answers of all rows.

        Raises:
            InvalidLogitsError: invalid logits, in a strict model.
        """
        for _ in self._layers_done():
            pass
        return self._output()

    def parts(self) -> Generator[Answers, None, ExitOutput]:
        """Yield the answers of the rows that leave at a layer, before the next layer runs; return those of all rows.

        Finding these rows reads from the device once a layer, for which CUDA has to finish its work.

        Raises:
            InvalidLogitsError: invalid logits, in a strict model.
        """
        exits = self.exits
        for layer in self._layers_done():
            rows = (exits.exit_layer == layer).nonzero()[:, 0]
            if rows.shape[0]:
                yield Answers(rows, exits.answers[rows], exits.exit_layer[rows])
        return self._output()

    def _layers_done(self) -> Iterator[int]:
        """Run the layers as long as rows are live; yield the number of each after its exit."""
        depth, backend = self.exits.depth, self.view.backend
        try:
            for layer, run_layer in enumerate(self.encoder.layers, start=1):
                runs = None if self.skip_from is None else self._runs(layer)
                if runs is None:
                    self.rows.through(layer, run_layer)
                    self._leave(layer, self.rows)
                else:
                    self._run_in_part(layer, run_layer, runs)
                yield layer
                rows = self.rows
                if rows.live == 0 or layer == depth:
                    break
                if rows.live < rows.rows and self.place.pays(rows, depth - layer):
                    self.rows = self.place.put(rows.moved(backend))
        finally:
            self.place.close()

    def _runs(self, layer: int) -> Tensor | None:
        """Count, and return, the rows that run a layer, ``[B]`` bool: live ones whose gate value is low, or NaN.

        Returns None if every live row does.
        """
        assert self.skip_from is not None and self.layers_run is not None
        ids = self.rows.batch.row_ids
        live = ids >= 0
        gate = torch.sigmoid(self.view.heads.gate(layer, self.rows).float())
        runs = live & ~(gate >= self.skip_from)
        self.layers_run[ids[runs].long()] += 1
        return None if bool(torch.equal(runs, live)) else runs

    def _run_in_part(self, layer: int, run_layer: object, runs: Tensor) -> None:
        """Run a layer on the rows `runs`; other rows keep their hidden states and skip the exit, except the last one.

        A row that skips the last layer is answered by the last exit from the hidden state that it has.
        """
        last, part = layer == self.exits.depth, self.rows.part(runs, self.view.backend)
        if part is not None:
            part.rows.through(layer, run_layer)  # type: ignore[arg-type]
            if not last:
                self._leave(layer, part.rows)
            self.rows.take_back(part, self.view.backend)
        if last:
            self._leave(layer, self.rows)

    def _leave(self, layer: int, rows: Rows) -> None:
        """Compute the exit after 1-based `layer` if it is due, and let rows leave."""
        counts, exits = None, self.exits
        if exits.rule.is_due(layer, exits.depth):
            batch = rows.batch
            inputs = self.source(layer, rows, batch.row_ids)
            counts = self.decide(*exits.call(layer, inputs, batch.row_ids, batch.offsets))
        rows.live, rows.live_tokens = self.counts.after(layer, counts, (rows.live, rows.live_tokens))
        if self.view.strict:
            refuse_invalid(self.counts.invalid)

    def _output(self) -> ExitOutput:
        invalid, exits = tuple(self.counts.finish()), self.exits
        if self.view.strict:
            refuse_invalid(invalid)
        layers_run = exits.exit_layer.clone() if self.layers_run is None else self.layers_run
        return ExitOutput(exits.answers, exits.exit_layer, layers_run, invalid)
