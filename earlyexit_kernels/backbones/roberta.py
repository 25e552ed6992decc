"""RoBERTa (arXiv 1907.11692), XLM-RoBERTa (arXiv 1911.02116) and CamemBERT (arXiv 1911.03894), which share one layout.

Positions count the ids that are not padding, from `pad_token_id` + 1, regardless of the attention mask.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn

from earlyexit_kernels.backbones.base import BackboneAdapter, StockHead, embed_with_types, encoder_layers


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
    embed=embed_with_types,
    layers=encoder_layers,
    positions=_positions,
    longest=_longest,
)
XLM_ROBERTA = dataclasses.replace(ROBERTA, model_type="xlm-roberta")
CAMEMBERT = dataclasses.replace(ROBERTA, model_type="camembert")
