"""DeBERTa (arXiv 2006.03654) and DeBERTa-v3 (arXiv 2111.09543): scores depend on the distance of two tokens.

Their layers compute attention themselves, on padded rows. Dropout before the dense module of the head
(`pooler_dropout`, 0 in the published models) is not applied in training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
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


def _settings(config: Any) -> Mapping[str, Any]:
    return {"activation": config.pooler_hidden_act}


def _rectangle_arguments(backbone: nn.Module, states: Tensor, keep: Tensor) -> Mapping[str, Any]:
    encoder: Any = backbone.encoder
    return {
        "attention_mask": encoder.get_attention_mask(keep),
        "relative_pos": encoder.get_rel_pos(states),
        "rel_embeddings": encoder.get_rel_embedding(),
    }


def _layers(backbone: nn.Module) -> Sequence[nn.Module]:
    """Return the layers.

    Raises:
        ValueError: the encoder has a convolution, which reads neighbouring tokens beside its first layer.
    """
    encoder: Any = backbone.encoder
    config: Any = backbone.config
    if getattr(encoder, "conv", None) is not None:
        raise ValueError(
            f"conv_kernel_size={config.conv_kernel_size} of this DeBERTa is not supported: its exits would "
            "answer without the convolution beside its first layer; take a DeBERTa without one, such as DeBERTa-v3"
        )
    return encoder_layers(backbone)


def _relative(backbone: nn.Module) -> Sequence[nn.Module]:
    encoder: Any = backbone.encoder
    return [getattr(encoder, name) for name in ("rel_embeddings", "LayerNorm") if hasattr(encoder, name)]


DEBERTA_V2 = BackboneAdapter(
    model_type="deberta-v2",
    base="deberta",
    head=StockHead(dense="pooler.dense", settings=_settings),
    embed=embed_with_types,
    layers=_layers,
    positions=column_positions,
    longest=position_limit,
    names=None,
    rectangle_arguments=_rectangle_arguments,
    beside_layers=_relative,
)
DEBERTA = dataclasses.replace(DEBERTA_V2, model_type="deberta")
