"""ELECTRA (arXiv 2003.10555): a BERT whose embeddings may be narrower and whose head is RoBERTa's with GELU."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from earlyexit_kernels.backbones.base import (
    BackboneAdapter,
    StockHead,
    column_positions,
    embed_with_types,
    encoder_layers,
    position_limit,
)


def _embed(backbone: nn.Module, ids: Tensor, positions: Tensor, types: Tensor) -> Tensor:
    embedded = embed_with_types(backbone, ids, positions, types)
    project: Any = getattr(backbone, "embeddings_project", None)
    return embedded if project is None else project(embedded)


ELECTRA = BackboneAdapter(
    model_type="electra",
    base="electra",
    head=StockHead(
        dense="classifier.dense",
        out="classifier.out_proj",
        dropout="classifier.dropout",
        activation="gelu",
        dropout_before_dense=True,
    ),
    embed=_embed,
    layers=encoder_layers,
    positions=column_positions,
    longest=position_limit,
)
