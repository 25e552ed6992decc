"""Decoders as classifiers: causal layers, rotary positions, and a linear on the last token of the row.

Llama (arXiv 2307.09288), Mistral (arXiv 2310.06825), Qwen2 (arXiv 2407.10671), Qwen3 (arXiv 2505.09388), Gemma 2 (arXiv
2408.00118) and Gemma 3 (arXiv 2503.19786).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from earlyexit_kernels.backbones.base import (
    BackboneAdapter,
    StockHead,
    column_positions,
    embed_tokens,
    layers_of,
    norm_of,
    position_limit,
    rotary,
    rotary_by_type,
)


def _window(config: Any) -> int | None:
    return config.sliding_window


LLAMA = BackboneAdapter(
    model_type="llama",
    base="model",
    head=StockHead(dense=None, out="score", dropout=None, pooling="last"),
    embed=embed_tokens,
    layers=layers_of,
    positions=column_positions,
    longest=position_limit,
    names=None,
    embeddings="embed_tokens",
    exit_norm=norm_of,
    layer_arguments=rotary,
)
MISTRAL = dataclasses.replace(LLAMA, model_type="mistral")
QWEN2 = dataclasses.replace(LLAMA, model_type="qwen2", window=_window)
QWEN3 = dataclasses.replace(QWEN2, model_type="qwen3")
GEMMA2 = dataclasses.replace(QWEN2, model_type="gemma2")
GEMMA3 = dataclasses.replace(QWEN2, model_type="gemma3_text", layer_arguments=rotary_by_type)
