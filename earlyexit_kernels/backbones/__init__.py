"""Model families: one adapter each, listed in the table below."""

from __future__ import annotations

import dataclasses

from earlyexit_kernels.arguments import defined_again
from earlyexit_kernels.backbones.albert import ALBERT
from earlyexit_kernels.backbones.base import (
    BackboneAdapter,
    EmbeddingSum,
    GatedLayerNames,
    LayerNames,
    StockHead,
    check_adapter,
    check_parts,
    column_positions,
    embed_with_types,
    encoder_layers,
    position_limit,
)
from earlyexit_kernels.backbones.bert import BERT
from earlyexit_kernels.backbones.deberta import DEBERTA, DEBERTA_V2
from earlyexit_kernels.backbones.decoders import GEMMA2, GEMMA3, LLAMA, MISTRAL, QWEN2, QWEN3
from earlyexit_kernels.backbones.distilbert import DISTILBERT
from earlyexit_kernels.backbones.electra import ELECTRA
from earlyexit_kernels.backbones.eurobert import EUROBERT
from earlyexit_kernels.backbones.modernbert import MODERNBERT
from earlyexit_kernels.backbones.mpnet import MPNET
from earlyexit_kernels.backbones.roberta import (
    CAMEMBERT,
    DATA2VEC_TEXT,
    ROBERTA,
    ROBERTA_PRELAYERNORM,
    XLM_ROBERTA,
    XLM_ROBERTA_XL,
)

__all__ = [
    "BACKBONES",
    "BackboneAdapter",
    "EmbeddingSum",
    "GatedLayerNames",
    "LayerNames",
    "StockHead",
    "adapter_of",
    "check_parts",
    "column_positions",
    "embed_with_types",
    "encoder_layers",
    "position_limit",
    "register",
]

#: All families that a model can have, by the model type of their config; `register` adds to it.
BACKBONES: dict[str, BackboneAdapter] = {
    "bert": BERT,
    "roberta": ROBERTA,
    "albert": ALBERT,
    "electra": ELECTRA,
    "distilbert": DISTILBERT,
    "xlm-roberta": XLM_ROBERTA,
    "camembert": CAMEMBERT,
    "data2vec-text": DATA2VEC_TEXT,
    "roberta-prelayernorm": ROBERTA_PRELAYERNORM,
    "xlm-roberta-xl": XLM_ROBERTA_XL,
    "modernbert": MODERNBERT,
    "eurobert": EUROBERT,
    "deberta": DEBERTA,
    "deberta-v2": DEBERTA_V2,
    "mpnet": MPNET,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
}


def register(adapter: BackboneAdapter) -> BackboneAdapter:
    """Make a family of encoders from outside the package usable by `to_early_exit`, saving and loading.

    Call it in a module that a program imports before it loads a saved model of the family. An adapter replaces one that
    differs only in functions of the same module and qualified name, so that a notebook cell can run again; models keep
    the adapter that they were built with.

    Args:
        adapter: where the parts of the family's encoder and classifier are.

    Returns:
        The adapter.

    Raises:
        TypeError: not a `BackboneAdapter`.
        ValueError: a field has the wrong kind of value, or another adapter has its model type.

    Example:
        >>> import earlyexit_kernels as ee
        >>> from earlyexit_kernels.backbones import column_positions, embed_with_types, encoder_layers, position_limit
        >>> ernie = ee.backbones.BackboneAdapter(
        ...     model_type="ernie",
        ...     base="ernie",
        ...     head=ee.backbones.StockHead(dense="ernie.pooler.dense"),
        ...     embed=embed_with_types,
        ...     layers=encoder_layers,
        ...     positions=column_positions,
        ...     longest=position_limit,
        ... )
        >>> ee.backbones.register(ernie).model_type
        'ernie'
        >>> _ = ee.backbones.BACKBONES.pop("ernie")  # forget it again
    """
    check_adapter(adapter)
    known = BACKBONES.setdefault(adapter.model_type, adapter)
    if not _replaces(adapter, known):
        raise ValueError(
            f"register: model_type {adapter.model_type!r} has another adapter already; give the config of the family "
            f"another model_type, or remove that one with earlyexit_kernels.backbones.BACKBONES.pop("
            f"{adapter.model_type!r})"
        )
    BACKBONES[adapter.model_type] = adapter
    return adapter


def _replaces(adapter: BackboneAdapter, known: BackboneAdapter) -> bool:
    """Return whether two adapters are equal, up to functions that were defined again."""
    pairs = ((getattr(adapter, field.name), getattr(known, field.name)) for field in dataclasses.fields(adapter))
    return all(new == old or defined_again(new, old) for new, old in pairs)


def adapter_of(model_type: str) -> BackboneAdapter:
    """Return the adapter of a family.

    Raises:
        ValueError: no adapter for it; the message names the supported families.
    """
    if model_type not in BACKBONES:
        raise ValueError(
            f"model_type {model_type!r} has no adapter; supported are {sorted(BACKBONES)}. Import the module that "
            "registers one, or write it: earlyexit_kernels.backbones.register"
        )
    return BACKBONES[model_type]
