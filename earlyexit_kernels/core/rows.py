"""The rows of a batch on their way through the layers: packed tokens, where each row lies, what exits read of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from earlyexit_kernels.core.attention import attend_by_plan
from earlyexit_kernels.core.calls import Calls, Request, layer_calls, request_of
from earlyexit_kernels.core.encoder import Embed
from earlyexit_kernels.core.packing import PackedBatch, pack, row_keys, up_to_last
from earlyexit_kernels.core.view import Inputs, View
from earlyexit_kernels.ops import raw
from earlyexit_kernels.types import normed


@dataclass
class Rows:
    """The rows of a batch at a layer; a `types.RowStates`. Rows that have left have id -1 until the next compaction.

    Attributes:
        hidden: their tokens ``[T, H]``, as layers read and write them.
        batch: where each row lies in them.
        request: what the layers need to know about the rows of the request, or None.
        norm: through which exits and gates read the tokens, or None.
        live, live_tokens: number of live rows and of their tokens; on CUDA upper bounds.
        called: how layers run on them; None: as `layer_calls` says.
    """

    hidden: Tensor
    batch: PackedBatch
    request: Request | None
    norm: Callable[[Tensor], Tensor] | None
    live: int
    live_tokens: int
    called: Calls | None = None

    @property
    def calls(self) -> Calls:
        """How layers run on them."""
        if self.called is None:
            self.called = layer_calls(self.batch, self.hidden[None], self.request)
        return self.called

    @property
    def tokens(self) -> Tensor:
        """``[T, H]`` after the norm."""
        return normed(self.norm, self.hidden)

    @property
    def offsets(self) -> Tensor:
        """``[B + 1]`` int32."""
        return self.batch.offsets

    @property
    def rows(self) -> int:
        """B, rows that have left included."""
        return self.batch.row_ids.shape[0]

    def pool(self, tokens: Tensor, pooling: str) -> Tensor:
        """Return one vector ``[B, F]`` per row of tokens ``[T, F]``, as in `RowStates`."""
        if pooling == "mean":
            return torch.segment_reduce(tokens.float(), "mean", offsets=self.offsets.long(), axis=0)
        if pooling == "last":
            return tokens.index_select(0, (self.offsets[1:] - 1).clamp(min=0))
        return tokens.index_select(0, self.offsets[:-1])

    def attend(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        """Return attention within each row, over and to ``[T, heads, D]``."""
        return attend_by_plan(query, key, value, self.calls.plan, None, dropout)

    def through(self, layer: int, run_layer: Callable[..., Any]) -> None:
        """Run 1-based `layer` on the tokens."""
        self.hidden = self.calls.run(layer, run_layer, self.hidden[None])[0]

    def with_hidden(self, hidden: Tensor) -> Rows:
        """Return these rows with other tokens ``[T, H]``."""
        return dataclasses.replace(self, hidden=hidden)

    def moved(self, backend: str) -> Rows:
        """Return the live rows, in order, in a buffer of their own."""
        return self._moved(self.batch, self.live, self.live_tokens, backend)[0]

    def part(self, runs: Tensor, backend: str) -> Part | None:
        """Return copies of the rows `runs` ``[B]`` bool, or None if there are none; it reads their number."""
        lengths = self.batch.offsets.diff()
        count, tokens = torch.stack((runs.sum(), lengths[runs].sum())).tolist()
        if not count:
            return None
        chosen = dataclasses.replace(self.batch, tokens=None, row_ids=torch.where(runs, self.batch.row_ids, -1))
        return Part(*self._moved(chosen, count, tokens, backend), count, tokens)

    def take_back(self, part: Part, backend: str) -> None:
        """Copy the rows of a part, and their ids, back to where they were; those that left there have left here."""
        batch, index = self.batch, part.source.long()
        place = torch.full_like(batch.row_ids, -1)
        place[index] = torch.arange(index.shape[0], dtype=torch.int32, device=index.device)
        gather_rows = raw("gather_rows", backend, place.device)
        gather_rows(part.rows.hidden.contiguous(), part.rows.batch.offsets, place, batch.offsets, self.hidden)
        batch.row_ids[index] = part.rows.batch.row_ids
        self.live -= part.live - part.rows.live
        self.live_tokens -= part.tokens - part.rows.live_tokens

    def _moved(self, batch: PackedBatch, live: int, tokens: int, backend: str) -> tuple[Rows, Tensor]:
        """Return the rows of `batch` with an id, and the old index ``[live]`` int32 of each, -1 for none.

        Where the host does not know the lengths, `live` and `tokens` are upper bounds: the surplus rows have id -1 and
        no tokens. Their offsets are within `tokens`, since each row that left had at least one.
        """
        device = self.hidden.device
        compact, gather_rows = raw("compact", backend, device), raw("gather_rows", backend, device)
        row_ids, offsets, source = compact(batch.row_ids, batch.offsets)
        row_ids, offsets, source = row_ids[:live], offsets[: live + 1], source[:live]
        hidden = self.hidden.new_empty(tokens, self.hidden.shape[1])
        gather_rows(self.hidden.contiguous(), batch.offsets, source, offsets, hidden)
        lengths = None if batch.lengths is None else tuple(batch.lengths[i] for i in source.tolist())
        moved = PackedBatch(None, offsets, row_ids, lengths, batch.longest)
        return Rows(hidden, moved, self.request, self.norm, live, tokens), source


class Part(NamedTuple):
    """Copies of some rows of a batch.

    Attributes:
        rows: the copies.
        source: ``[B']`` int32, the index of each in the batch.
        live, tokens: their number and that of their tokens, before any left.
    """

    rows: Rows
    source: Tensor
    live: int
    tokens: int


def embedded(view: View, inputs: Inputs, embed: Embed, *, with_keys: bool) -> tuple[Rows, Tensor | None]:
    """Pack and embed a batch of at least one row.

    Args:
        view: of the model.
        inputs: checked.
        embed: of the encoder.
        with_keys: compute a key for each row, for criteria that draw random numbers.

    Returns:
        The rows before layer 1, and ``[N]`` int64 of `packing.row_keys` or None.

    Raises:
        ValueError: the token of a row that the exits read is masked.
    """
    ids, mask, types, positions = inputs
    reads = view.heads.config.reads
    if reads == "last":
        mask = up_to_last(ids, mask, view.backbone.config.pad_token_id)
    batch = pack(ids, mask, first_token=reads == "first")
    if positions is None:
        positions = view.adapter.positions(view.backbone, ids)
    types = torch.zeros_like(ids) if types is None else types
    tokens, places = batch.take(ids), batch.take(positions.expand(ids.shape))
    hidden = embed(tokens, places, batch.take(types.expand(ids.shape)))[0]
    request = request_of(view, batch, ids.shape[1], places[0])
    rows = Rows(hidden, batch, request, view.exit_norm, batch.row_ids.shape[0], hidden.shape[0])
    return rows, row_keys(tokens, batch.offsets) if with_keys else None
