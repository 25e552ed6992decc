"""The weights of embeddings that are a norm of a sum, where `ops.rows_embed` computes the same as their module."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from earlyexit_kernels.backbones import BackboneAdapter, EmbeddingSum
from earlyexit_kernels.engine.gated_weights import unlike_norm
from earlyexit_kernels.engine.layer_parts import parts_unsupported_reason

TABLES = ("words", "positions", "types")


class SumWeights(NamedTuple):
    """The weights, read in place, as the op takes them between `tokens` and `offsets`.

    Attributes:
        words: ``[V, E]``.
        positions, types: ``[P, E]`` and ``[Y, E]``, or None for embeddings that are not added.
        weight, bias: ``[E]``, of the norm.
        eps: of the norm.
    """

    words: Tensor
    positions: Tensor | None
    types: Tensor | None
    weight: Tensor
    bias: Tensor
    eps: float

    @staticmethod
    def of(adapter: BackboneAdapter, backbone: nn.Module) -> SumWeights:
        """Return the weights of a backbone that `embedding_unsupported_reason` accepts."""
        part = _parts(adapter, backbone)
        norm = part.pop("norm")
        weight, bias = norm.weight.detach(), norm.bias
        tables: list[Any] = [part[name].weight.detach() if name in part else None for name in TABLES]
        words, positions, types = tables
        bias = torch.zeros_like(weight) if bias is None else bias.detach()
        return SumWeights(words, positions, types, weight, bias, norm.eps)


def embedding_unsupported_reason(adapter: BackboneAdapter, backbone: nn.Module) -> str | None:
    """Return why `ops.rows_embed` may compute something else than the embeddings of a backbone, or None."""
    embed = adapter.embed
    if type(embed) is not EmbeddingSum:
        return f"the adapter of {adapter.model_type!r} has another function than an EmbeddingSum as embed"
    module: Any = backbone.embeddings
    checks = {path: _unlike_norm if name == "norm" else _unlike_table for name, path in _paths(embed).items()}
    if reason := parts_unsupported_reason(module, checks, attention=None):
        return reason
    for path, each in module.named_modules():
        if isinstance(each, nn.Dropout) and each.training and each.p:
            return f"{path} ({type(each).__name__}) is in training mode"
    part = _parts(adapter, backbone)
    (width,) = part.pop("norm").weight.shape
    for name, table in part.items():
        if table.weight.shape[1] != width:
            return f"{getattr(embed, name)} has embeddings of width {table.weight.shape[1]}, the norm has {width}"
    return None


def _paths(embed: EmbeddingSum) -> dict[str, str]:
    """Return the dotted names of the parts that are there."""
    return {name: path for name, path in vars(embed).items() if path is not None}


def _parts(adapter: BackboneAdapter, backbone: Any) -> dict[str, Any]:
    embed: Any = adapter.embed
    return {name: backbone.embeddings.get_submodule(path) for name, path in _paths(embed).items()}


def _unlike_table(module: nn.Module) -> str | None:
    plain = type(module) is nn.Embedding and type(module._parameters.get("weight")) is nn.Parameter
    return None if plain and module.max_norm is None else "is not a plain Embedding without max_norm"


def _unlike_norm(module: Any) -> str | None:
    plain = not unlike_norm(module) and type(module._parameters.get("weight")) is nn.Parameter
    # a norm over more than the last axis has a weight of more axes
    return None if plain and len(module.normalized_shape) == 1 else "is not a plain LayerNorm with a weight"
