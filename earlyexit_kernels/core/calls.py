"""How layers are called on packed rows: the attention plan, and what a family's layers take besides hidden states."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from earlyexit_kernels.core.attention_plan import (
    AttentionPlan,
    plan_attention,
)
from earlyexit_kernels.core.packing import PackedBatch, rows_of_tokens
from earlyexit_kernels.core.view import View


class Calls(Protocol):
    """How the layers run on the rows of a batch."""

    @property
    def plan(self) -> AttentionPlan:
        """By which exits attend."""

    def run(self, layer: int, run_layer: Callable[..., Any], hidden: Tensor) -> Tensor:
        """Return the hidden states ``[1, T, H]`` after 1-based `layer`."""


class LayerCalls(NamedTuple):
    """How the layers are called on the rows of a batch.

    Attributes:
        plan: of the attention.
        arguments: further keyword arguments of each layer, or None for none.
        rectangles: keyword arguments of all layers for each bucket of the plan, for layers that compute attention
            themselves; None for layers that follow the plan.
    """

    plan: AttentionPlan
    arguments: Sequence[Mapping[str, Any]] | None = None
    rectangles: Sequence[Mapping[str, Any]] | None = None

    def run(self, layer: int, run_layer: Callable[..., Any], hidden: Tensor) -> Tensor:
        """Return the hidden states ``[1, T, H]`` after 1-based `layer`."""
        if self.rectangles is not None:
            return self._run_rectangles(run_layer, hidden)
        more = {} if self.arguments is None else self.arguments[layer - 1]
        return hidden_of(run_layer(hidden, plan=self.plan, **more))

    def _run_rectangles(self, run_layer: Callable[..., Any], hidden: Tensor) -> Tensor:
        pairs = zip(self.plan.buckets, self.rectangles or (), strict=True)
        return self.plan.join([hidden_of(run_layer(bucket.gather(hidden[0]), **more)) for bucket, more in pairs])[None]


class Request(Protocol):
    """What the layers of a family need to know about the rows of a request."""

    def calls(self, batch: PackedBatch, hidden: Tensor) -> LayerCalls:
        """Return how the layers are called on rows of this request and their tokens ``[1, t, H]``."""


@dataclass(frozen=True)
class RequestTokens:
    """The tokens of a request, for families whose layers read their positions.

    Attributes:
        offsets: ``[N + 1]`` int32, rows of the tokens.
        positions: ``[T]`` int64.
        columns: ``[T]`` column in the padded row, or None if no row has holes.
        arguments: ``(hidden [1, t, H], positions [1, t]) ->`` keyword arguments of each layer.
    """

    offsets: Tensor
    positions: Tensor
    columns: Tensor | None
    arguments: Callable[[Tensor, Tensor], Sequence[Mapping[str, Any]]]

    def calls(self, batch: PackedBatch, hidden: Tensor) -> LayerCalls:
        """Return how the layers are called on rows of this request and their tokens ``[1, t, H]``."""
        index: Any = slice(None)
        if hidden.shape[1] != self.positions.shape[0]:  # rows have left; those that are left are in order
            index, _ = self.places_of(batch.offsets, batch.row_ids, hidden.shape[1])
        plan = plan_attention(batch, None if self.columns is None else self.columns[index])
        return LayerCalls(plan, self.arguments(hidden, self.positions[index][None]))

    def places_of(self, offsets: Tensor, row_ids: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Return where the tokens of some rows are among those of the request, and in their rows, ``[t]`` int64.

        Args:
            offsets: ``[B + 1]``, of the rows.
            row_ids: ``[B]``, of the rows in the request; negative for none.
            tokens: t; those of no row get places of other tokens.
        """
        row, place = rows_of_tokens(offsets, tokens)
        first = self.offsets[row_ids.clamp(min=0).long()]
        return (first[row] + place).clamp(max=self.positions.shape[0] - 1), place


@dataclass(frozen=True)
class RequestRectangles:
    """Rows of a request whose layers compute attention themselves, on padded rows.

    Attributes:
        arguments: ``(states [rows, width, H], keep [rows, width]) ->`` keyword arguments of the layers.
    """

    arguments: Callable[[Tensor, Tensor], Mapping[str, Any]]

    def calls(self, batch: PackedBatch, hidden: Tensor) -> LayerCalls:
        """Return how the layers are called on rows of this request and their tokens ``[1, t, H]``."""
        plan = plan_attention(batch)
        if plan.offsets is not None:
            plan = plan.rectangle(hidden.shape[1])
        rectangles = []
        for bucket in plan.buckets:
            states = bucket.gather(hidden[0])
            keep = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
            rectangles.append(self.arguments(states, keep if bucket.mask is None else bucket.mask[:, 0, 0]))
        return LayerCalls(plan, rectangles=rectangles)


def request_of(view: View, batch: PackedBatch, length: int, positions: Tensor) -> Request | None:
    """Return what the layers need to know about the rows of a request, or None where that is nothing.

    Args:
        view: of the model.
        batch: all rows of the request.
        length: S, of the padded rows.
        positions: ``[T]`` of the packed tokens.

    Raises:
        ValueError: a row has holes, which the family does not support.
    """
    adapter = view.adapter
    if adapter.layer_arguments is not None:
        arguments = functools.partial(adapter.layer_arguments, view.backbone)
        columns = None if batch.tokens is None else batch.tokens % length
        if columns is not None and batch.lengths is not None and not _has_holes(batch, columns):
            columns = None
        return RequestTokens(batch.offsets, positions, columns, arguments)
    if adapter.rectangle_arguments is None:
        return None
    if batch.tokens is not None and _has_holes(batch, batch.tokens % length):
        raise ValueError(
            f"attention_mask: expected padding at the ends of rows only, a row has it between tokens; layers of "
            f"{adapter.model_type!r} read the distance of two tokens, so leave such tokens out of input_ids"
        )
    return RequestRectangles(functools.partial(adapter.rectangle_arguments, view.backbone))


def _has_holes(batch: PackedBatch, columns: Tensor) -> bool:
    """Return whether the tokens of a row are not next to each other, by their columns ``[T]``; on CUDA it waits."""
    row, place = rows_of_tokens(batch.offsets, columns.shape[0])
    first = columns[batch.offsets[:-1].long()]
    return not torch.equal(columns, first[row] + place)


def layer_calls(batch: PackedBatch, hidden: Tensor, request: Request | None) -> LayerCalls:
    """Return how the layers are called on the rows of a batch, once for each batch and compaction.

    Args:
        batch: the rows.
        hidden: their tokens ``[1, T, H]``.
        request: what the layers need to know about the request, or None.
    """
    return LayerCalls(plan_attention(batch)) if request is None else request.calls(batch, hidden)


def hidden_of(layer_output: Any) -> Tensor:
    """Return the hidden states from the output of a family's layer, a tensor or a tuple that starts with it."""
    return layer_output[0] if isinstance(layer_output, tuple) else layer_output
