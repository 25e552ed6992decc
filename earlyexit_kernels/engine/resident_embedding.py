"""The embeddings of the packed tokens in the resident loop: one launch where the form of their module is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from earlyexit_kernels.engine.embedding_sum import SumWeights, embedding_unsupported_reason
from earlyexit_kernels.engine.resident_buffers import RowBuffers
from earlyexit_kernels.engine.view import ModelView
from earlyexit_kernels.ops import bare_op


def embedding_of(view: ModelView, rows: RowBuffers, out: Tensor, backend: str) -> Callable[[], None]:
    """Return a function that writes the embeddings of the packed tokens, by `ops.rows_embed` or the family's module.

    Args:
        view: of the model.
        rows: the packed tokens, before any row has left.
        out: ``[T, E]``, the packed tokens first.
        backend: of the op.
    """
    if embedding_unsupported_reason(view.adapter, view.backbone) is None:
        weights = SumWeights.of(view.adapter, view.backbone)
        return SummedEmbedding(weights, rows, out, bare_op("rows_embed", backend, out.device))
    return FamilyEmbedding(view, rows, out)


@dataclass(frozen=True)
class FamilyEmbedding:
    """The embeddings by the family's module, for all tokens of the capacity."""

    view: ModelView
    rows: RowBuffers
    out: Tensor

    def __call__(self) -> None:
        ids, positions, types, _ = self.rows.tokens[:, None]
        self.out.copy_(self.view.adapter.embed(self.view.backbone, ids, positions, types)[0])


@dataclass(frozen=True)
class SummedEmbedding:
    """The norm of a sum of embeddings, from weights that are read in place.

    Attributes:
        weights: of the tables and the norm.
        rows, out: as for `embedding_of`.
        op: `ops.rows_embed` of a back-end.
    """

    weights: SumWeights
    rows: RowBuffers
    out: Tensor
    op: Callable[..., None]

    def __call__(self) -> None:
        self.op(self.rows.tokens, *self.weights, self.rows.offsets, self.out)
