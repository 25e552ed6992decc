"""ALBERT (arXiv 1909.11942): layers share parameters in groups, so a layer here is one use of a group."""

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


def _widen(backbone: nn.Module) -> nn.Linear:
    encoder: Any = backbone.encoder
    return encoder.embedding_hidden_mapping_in


def _layers(backbone: nn.Module) -> Sequence[nn.Module]:
    encoder: Any = backbone.encoder
    depth, groups = encoder.config.num_hidden_layers, encoder.config.num_hidden_groups
    return [encoder.albert_layer_groups[int(i / (depth / groups))] for i in range(depth)]


def _parts(group: nn.Module) -> Sequence[nn.Module]:
    layers: Any = group.albert_layers
    return layers


ALBERT = BackboneAdapter(
    model_type="albert",
    base="albert",
    head=StockHead(dense="albert.pooler"),
    embed=EmbeddingSum(),
    layers=_layers,
    positions=column_positions,
    longest=position_limit,
    names=LayerNames(
        query="attention.query",
        key="attention.key",
        value="attention.value",
        attention_out="attention.dense",
        attention_norm="attention.LayerNorm",
        inner="ffn",
        activation="activation",
        outer="ffn_output",
        norm="full_layer_layer_norm",
    ),
    parts=_parts,
    shares_layers=True,
    widen=_widen,
)
