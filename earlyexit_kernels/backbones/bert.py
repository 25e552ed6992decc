"""BERT (arXiv 1810.04805)."""

from earlyexit_kernels.backbones.base import (
    BackboneAdapter,
    EmbeddingSum,
    StockHead,
    column_positions,
    encoder_layers,
    position_limit,
)

BERT = BackboneAdapter(
    model_type="bert",
    base="bert",
    head=StockHead(dense="bert.pooler.dense"),
    embed=EmbeddingSum(),
    layers=encoder_layers,
    positions=column_positions,
    longest=position_limit,
)
