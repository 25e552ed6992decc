"""The exits of the resident loop: computed by kernels where these know their form, else by their modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from earlyexit_kernels.criteria import Criterion
from earlyexit_kernels.engine.exits import (
    DENSE_ACTIVATIONS,
    ExitInputs,
    ExitMemory,
    ExitSource,
    LinearSource,
    ModuleSource,
    dense_exits,
    dense_source,
)
from earlyexit_kernels.engine.resident_buffers import Activations
from earlyexit_kernels.engine.states import PackedStates, PaddedStates
from earlyexit_kernels.engine.view import ModelView
from earlyexit_kernels.heads import ExitHeads
from earlyexit_kernels.heads.config import HeadConfig
from earlyexit_kernels.ops import rows_mean
from earlyexit_kernels.types import RowStates

#: Rows per call of exits that torch modules compute, in every bucket: a library's products round depending on the size.
EXIT_ROWS = 128


def exits_unsupported_reason(shape: HeadConfig, rule: Criterion) -> str | None:
    """Return why the loop cannot compute the exits of a model under a rule, or None if it can."""
    if shape.form != "linear":
        return "the exits attend to all tokens of a row"
    if shape.has_dense and shape.family_pooling == "late":
        return "the exits apply more than a linear layer to each token"
    if shape.reads == "mean" and rule.needs is not None:
        return f"criterion {rule.name!r} reads a scalar of exits on the mean of the tokens"
    if shape.has_dense and shape.activation not in DENSE_ACTIVATIONS:
        return f"the activation of the exits is {shape.activation!r}, supported are {tuple(DENSE_ACTIVATIONS)}"
    return None


def runs_modules(view: ModelView) -> bool:
    """Return whether torch modules compute the exits of a model that is supported, by products of a library."""
    heads, dtype, device = view.heads, view.dtype, view.device
    if view.criterion.exit_rule.needs is not None:
        return True
    return heads.linear_exits(dtype) is None and dense_exits(heads, dtype, device) is None


def exits_of(heads: ExitHeads, x: Activations, backend: str) -> ExitSource:
    """Return the exits for a rule that reads their logits alone.

    Args:
        heads: the exits.
        x: buffers of the loop.
        backend: of the ops.
    """
    linear, shape = heads.linear_exits(x.hidden.dtype), heads.config
    if linear is not None:
        return LinearSource(linear)
    if shape.reads == "mean":
        return ChunkedSource(ModuleSource(heads, None), x.features, backend)
    return dense_source(heads, x.features, backend) or ChunkedSource(ModuleSource(heads, None))


def exits_with_scalar(heads: ExitHeads, needs: str, states: PackedStates) -> ExitSource:
    """Return the exits of a request for a rule that needs a scalar.

    Args:
        heads: the exits.
        needs: the scalar.
        states: tokens after the embeddings, in the buffer of two sides.
    """
    return ChunkedSource(ModuleSource(heads, needs, ExitMemory(heads.first_memory(_readable(states), needs))))


@dataclass(frozen=True)
class ChunkedSource:
    """Exits that torch modules compute from the first tokens, or from their mean, on `EXIT_ROWS` rows per call.

    Attributes:
        source: computes them.
        means: ``[R, H]`` buffer for exits that read the mean, or None.
        backend: of `ops.rows_mean`.
    """

    source: ModuleSource
    means: Tensor | None = None
    backend: str = "auto"

    def __call__(self, layer: int, states: Any, row_ids: Tensor) -> ExitInputs:
        rows = row_ids.shape[0]
        chunk = self._chunks(states, row_ids, -rows % EXIT_ROWS)
        padded, parts = F.pad(row_ids, (0, -rows % EXIT_ROWS), value=-1), []
        for start in range(0, rows, EXIT_ROWS):
            parts.append(self.source(layer, chunk(start), padded[start : start + EXIT_ROWS]))
        joined: dict[str, Any] = {
            name: torch.cat([getattr(part, name) for part in parts])[:rows]
            for name in ("hidden", "aux")
            if getattr(parts[0], name) is not None
        }
        return parts[0]._replace(**joined)

    def _chunks(self, states: PackedStates, row_ids: Tensor, extra: int) -> Callable[[int], RowStates]:
        """Return a function of the states of `EXIT_ROWS` rows from one on; `extra` rows are added at the end."""
        if self.means is None:
            offsets = F.pad(_readable(states).offsets, (0, extra))
            return lambda start: states._replace(offsets=offsets[start : start + EXIT_ROWS + 1])
        rows_mean(states.hidden, states.offsets, row_ids, self.means, backend=self.backend)
        means = F.pad(self.means, (0, 0, 0, extra))
        # rows of one token, which is their mean
        return lambda start: PaddedStates(means[start : start + EXIT_ROWS, None], None)


def _readable(states: PackedStates) -> PackedStates:
    """Return states in which every row has a first token to read; rows without tokens read any."""
    return states._replace(offsets=states.offsets.clamp(max=states.hidden.shape[0] - 1))
