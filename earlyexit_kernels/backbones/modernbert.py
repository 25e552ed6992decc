"""ModernBERT (arXiv 2412.13663): norms before attention and feed-forward, rotary positions, windows in most layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from earlyexit_kernels.backbones.base import (
    BackboneAdapter,
    EmbeddingSum,
    GatedLayerNames,
    StockHead,
    column_positions,
    layers_of,
    pooling_of,
    position_limit,
    rotary_by_type,
)

#: `classifier_pooling` of the config -> `HeadConfig.family_pooling`.
POOLINGS = {"cls": "first", "mean": "mean"}


def _norm(backbone: nn.Module) -> nn.Module:
    return backbone.final_norm  # type: ignore[return-value]


def _window(config: Any) -> int | None:
    return config.sliding_window + 1


def _settings(config: Any) -> Mapping[str, Any]:
    return {
        "family_pooling": pooling_of(config, POOLINGS),
        "activation": config.classifier_activation,
        "dense_bias": config.classifier_bias,
        "norm_eps": config.norm_eps,
        "norm_bias": config.norm_bias,
    }


MODERNBERT = BackboneAdapter(
    model_type="modernbert",
    base="model",
    head=StockHead(dense="head.dense", norm="head.norm", dropout="drop", settings=_settings),
    embed=EmbeddingSum(words="tok_embeddings", positions=None, types=None, norm="norm"),
    layers=layers_of,
    positions=column_positions,
    longest=position_limit,
    names=GatedLayerNames(),
    exit_norm=_norm,
    layer_arguments=rotary_by_type,
    window=_window,
)
