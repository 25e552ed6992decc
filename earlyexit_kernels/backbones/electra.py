"""ELECTRA (arXiv 2003.10555): a BERT whose embeddings may be narrower and whose head is RoBERTa's with GELU."""

from __future__ import annotations

from torch import nn

from earlyexit_kernels.backbones.base import (
    BackboneAdapter,
    EmbeddingSum,
    StockHead,
    column_positions,
    encoder_layers,
    position_limit,
)


def _widen(backbone: nn.Module) -> nn.Linear | None:
    return getattr(backbone, "embeddings_project", None)


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
    embed=EmbeddingSum(),
    layers=encoder_layers,
    positions=column_positions,
    longest=position_limit,
    widen=_widen,
)
