"""DistilBERT (arXiv 1910.01108): no token types, and a ReLU in the head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from earlyexit_kernels.backbones.base import (
    BackboneAdapter,
    EmbeddingSum,
    LayerNames,
    StockHead,
    column_positions,
    position_limit,
)


def _layers(backbone: nn.Module) -> Sequence[nn.Module]:
    transformer: Any = backbone.transformer
    return transformer.layer


DISTILBERT = BackboneAdapter(
    model_type="distilbert",
    base="distilbert",
    head=StockHead(dense="pre_classifier", activation="relu"),
    embed=EmbeddingSum(types=None),
    layers=_layers,
    positions=column_positions,
    longest=position_limit,
    names=LayerNames(
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        attention_out="attention.out_lin",
        attention_norm="sa_layer_norm",
        inner="ffn.lin1",
        activation="ffn.activation",
        outer="ffn.lin2",
        norm="output_layer_norm",
    ),
)
