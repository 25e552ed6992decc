"""The embeddings of the packed tokens in the resident loop: one launch where the form of their module is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from earlyexit_kernels.backbones import EmbeddingSum
from earlyexit_kernels.engine.gated_weights import unlike_norm
from earlyexit_kernels.engine.layer_parts import parts_unsupported_reason
from earlyexit_kernels.engine.resident_buffers import RowBuffers
from earlyexit_kernels.engine.view import ModelView
from earlyexit_kernels.ops import bare_op

TABLES = ("words", "positions", "types")


def embedding_of(view: ModelView, rows: RowBuffers, out: Tensor, backend: str) -> Callable[[], None]:
    """Return a function that writes the embeddings of the packed tokens, by `ops.rows_embed` or the family's module.

    Args:
        view: of the model.
        rows: the packed tokens, before any row has left.
        out: ``[T, E]``, the packed tokens first.
        backend: of the op.
    """
    if embedding_unsupported_reason(view) is None:
        return SummedEmbedding.of(view, rows, out, backend)
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
        tables: words, positions and types, None for those that are not added.
        weight, bias, eps: of the norm.
        rows, out: as for `embedding_of`.
        op: `ops.rows_embed` of a back-end.
    """

    tables: tuple[Any, ...]
    weight: Tensor
    bias: Tensor
    eps: float
    rows: RowBuffers
    out: Tensor
    op: Callable[..., None]

    @staticmethod
    def of(view: ModelView, rows: RowBuffers, out: Tensor, backend: str) -> SummedEmbedding:
        """Return the embeddings of a model that `embedding_unsupported_reason` accepts."""
        part = _parts(view)
        norm = part.pop("norm")
        weight, bias = norm.weight.detach(), norm.bias
        tables = tuple(part[name].weight.detach() if name in part else None for name in TABLES)
        op = bare_op("rows_embed", backend, out.device.type)
        bias = torch.zeros_like(weight) if bias is None else bias.detach()
        return SummedEmbedding(tables, weight, bias, norm.eps, rows, out, op)

    def __call__(self) -> None:
        norm = self.weight, self.bias, self.eps
        self.op(self.rows.tokens, *self.tables, *norm, self.rows.offsets, self.out)


def embedding_unsupported_reason(view: ModelView) -> str | None:
    """Return why `ops.rows_embed` may compute something else than the embeddings of a model, or None."""
    embed = view.adapter.embed
    if type(embed) is not EmbeddingSum:
        return f"the adapter of {view.adapter.model_type!r} has another function than an EmbeddingSum as embed"
    module = view.backbone.embeddings
    checks = {path: _unlike_norm if name == "norm" else _unlike_table for name, path in _paths(embed).items()}
    if reason := parts_unsupported_reason(module, checks, attention=None):
        return reason
    for path, each in module.named_modules():
        if isinstance(each, nn.Dropout) and each.training and each.p:
            return f"{path} ({type(each).__name__}) is in training mode"
    part = _parts(view)
    (width,) = part.pop("norm").weight.shape
    for name, table in part.items():
        if table.weight.shape[1] != width:
            return f"{getattr(embed, name)} has embeddings of width {table.weight.shape[1]}, the norm has {width}"
    return None


def _paths(embed: EmbeddingSum) -> dict[str, str]:
    """Return the dotted names of the parts that are there."""
    return {name: path for name, path in vars(embed).items() if path is not None}


def _parts(view: ModelView) -> dict[str, Any]:
    embed: Any = view.adapter.embed
    return {name: view.backbone.embeddings.get_submodule(path) for name, path in _paths(embed).items()}


def _unlike_table(module: nn.Module) -> str | None:
    plain = type(module) is nn.Embedding and type(module._parameters.get("weight")) is nn.Parameter
    return None if plain and module.max_norm is None else "is not a plain Embedding without max_norm"


def _unlike_norm(module: Any) -> str | None:
    plain = not unlike_norm(module) and type(module._parameters.get("weight")) is nn.Parameter
    # a norm over more than the last axis has a weight of more axes
    return None if plain and len(module.normalized_shape) == 1 else "is not a plain LayerNorm with a weight"
