"""Model families: one adapter each, listed here and nowhere else."""

from __future__ import annotations

from earlyexit_kernels.backbones.albert import ALBERT
from earlyexit_kernels.backbones.base import BackboneAdapter, LayerNames, StockHead, check_parts, column_positions
from earlyexit_kernels.backbones.bert import BERT
from earlyexit_kernels.backbones.distilbert import DISTILBERT
from earlyexit_kernels.backbones.electra import ELECTRA
from earlyexit_kernels.backbones.roberta import CAMEMBERT, ROBERTA, XLM_ROBERTA

__all__ = ["BACKBONES", "BackboneAdapter", "LayerNames", "StockHead", "adapter_of", "check_parts", "column_positions"]

BACKBONES: dict[str, BackboneAdapter] = {
    "bert": BERT,
    "roberta": ROBERTA,
    "albert": ALBERT,
    "electra": ELECTRA,
    "distilbert": DISTILBERT,
    "xlm-roberta": XLM_ROBERTA,
    "camembert": CAMEMBERT,
}


def adapter_of(model_type: str) -> BackboneAdapter:
    """The adapter of a family.

    Raises:
        ValueError: no adapter for it; the message names the supported families.
    """
    if model_type not in BACKBONES:
        raise ValueError(f"model_type {model_type!r} has no adapter; supported are {sorted(BACKBONES)}")
    return BACKBONES[model_type]
