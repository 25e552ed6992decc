"""RoBERTa (arXiv 1907.11692) and the encoders of its layout: XLM-RoBERTa (arXiv 1911.02116), CamemBERT (arXiv
1911.03894), data2vec for text (arXiv 2202.03555), and, with norms before attention and feed-forward,
RoBERTa-PreLayerNorm (arXiv 1904.01038) and XLM-RoBERTa-XL (arXiv 2105.00572).

Positions count the ids that are not padding, from `pad_token_id` + 1, regardless of the attention mask.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn

from earlyexit_kernels.backbones.base import (
    BackboneAdapter,
    EmbeddingSum,
    StockHead,
    embed_with_types,
    encoder_layers,
)


def _positions(backbone: nn.Module, input_ids: Tensor) -> Tensor:
    embeddings: Any = backbone.embeddings
    return embeddings.create_position_ids_from_input_ids(input_ids, embeddings.padding_idx)


def _longest(config: Any) -> int:
    return config.max_position_embeddings - config.pad_token_id - 1


ROBERTA = BackboneAdapter(
    model_type="roberta",
    base="roberta",
    head=StockHead(
        dense="classifier.dense",
        out="classifier.out_proj",
        dropout="classifier.dropout",
        dropout_before_dense=True,
    ),
    embed=EmbeddingSum(),
    layers=encoder_layers,
    positions=_positions,
    longest=_longest,
)
XLM_ROBERTA = dataclasses.replace(ROBERTA, model_type="xlm-roberta")
CAMEMBERT = dataclasses.replace(ROBERTA, model_type="camembert")
DATA2VEC_TEXT = dataclasses.replace(ROBERTA, model_type="data2vec-text", base="data2vec_text")


def _norm(backbone: nn.Module) -> nn.Module:
    return backbone.LayerNorm  # type: ignore[return-value]


def _norm_of_encoder(backbone: nn.Module) -> nn.Module:
    encoder: Any = backbone.encoder
    return encoder.LayerNorm


ROBERTA_PRELAYERNORM = dataclasses.replace(
    ROBERTA, model_type="roberta-prelayernorm", base="roberta_prelayernorm", names=None, exit_norm=_norm
)
#: Its embeddings have no norm.
XLM_ROBERTA_XL = dataclasses.replace(
    ROBERTA, model_type="xlm-roberta-xl", embed=embed_with_types, names=None, exit_norm=_norm_of_encoder
)
