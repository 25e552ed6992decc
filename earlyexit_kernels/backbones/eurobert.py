"""EuroBERT (arXiv 2503.05500): a bidirectional encoder of Llama's layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from earlyexit_kernels.backbones.base import (
    BackboneAdapter,
    GatedLayerNames,
    StockHead,
    column_positions,
    embed_tokens,
    layers_of,
    norm_of,
    pooling_of,
    position_limit,
    rotary,
)

#: `classifier_pooling` of the config -> `HeadConfig.family_pooling`.
POOLINGS = {"bos": "first", "mean": "mean", "late": "late"}


def _settings(config: Any) -> Mapping[str, Any]:
    return {"family_pooling": pooling_of(config, POOLINGS)}


EUROBERT = BackboneAdapter(
    model_type="eurobert",
    base="model",
    head=StockHead(dense="dense", dropout=None, activation="gelu", settings=_settings),
    embed=embed_tokens,
    layers=layers_of,
    positions=column_positions,
    longest=position_limit,
    names=GatedLayerNames(
        attention_norm="input_layernorm",
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        attention_out="self_attn.o_proj",
        norm="post_attention_layernorm",
        inner=("mlp.gate_proj", "mlp.up_proj"),
        activation="mlp.act_fn",
        outer="mlp.down_proj",
    ),
    embeddings="embed_tokens",
    exit_norm=norm_of,
    layer_arguments=rotary,
)
