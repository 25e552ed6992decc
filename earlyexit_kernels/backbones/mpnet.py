"""MPNet (arXiv 2004.09297): absolute positions, and a bias of the scores by the distance of two tokens.

Its layers compute attention themselves, on padded rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from earlyexit_kernels.backbones.base import BackboneAdapter, StockHead, encoder_layers

#: Padding token, and position of the first token less 1; the family has it in its code.
PADDING = 1


def _embed(backbone: nn.Module, ids: Tensor, positions: Tensor, types: Tensor) -> Tensor:
    embeddings: Any = backbone.embeddings
    return embeddings(input_ids=ids, position_ids=positions)


def _positions(backbone: nn.Module, input_ids: Tensor) -> Tensor:
    """Return positions that count the ids that are not padding, as the family does for padded ids."""
    tokens = (input_ids != PADDING).long()
    return tokens.cumsum(dim=1) * tokens + PADDING


def _longest(config: Any) -> int:
    return config.max_position_embeddings - PADDING - 1


def _rectangle_arguments(backbone: nn.Module, states: Tensor, keep: Tensor) -> Mapping[str, Any]:
    encoder: Any = backbone.encoder
    lowest = torch.finfo(states.dtype).min
    mask = torch.zeros(keep.shape, dtype=states.dtype, device=states.device).masked_fill(~keep, lowest)
    return {"attention_mask": mask[:, None, None, :], "position_bias": encoder.compute_position_bias(states)}


def _bias(backbone: nn.Module) -> Sequence[nn.Module]:
    encoder: Any = backbone.encoder
    return [encoder.relative_attention_bias]


MPNET = BackboneAdapter(
    model_type="mpnet",
    base="mpnet",
    head=StockHead(
        dense="classifier.dense",
        out="classifier.out_proj",
        dropout="classifier.dropout",
        dropout_before_dense=True,
    ),
    embed=_embed,
    layers=encoder_layers,
    positions=_positions,
    longest=_longest,
    names=None,
    rectangle_arguments=_rectangle_arguments,
    beside_layers=_bias,
)
