"""Embeddings that are a norm of a sum (`EmbeddingSum`), where kernels compute the same as their module."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from earlyexit_kernels.backbones.base import BackboneAdapter, EmbeddingSum
from earlyexit_kernels.backbones.forms import read_parts
from earlyexit_kernels.backbones.forms_gated import Norm, bias_fits, read_norm
from earlyexit_kernels.errors import Unsupported

TABLES = ("words", "positions", "types")


class SumWeights(NamedTuple):
    """The weights, read in place, in the order in which `_C.Embedding` and the vector kernels take them.

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


def read_embedding_sum(adapter: BackboneAdapter, backbone: Any) -> SumWeights:
    """Return the weights of the embeddings of a backbone.

    Raises:
        Unsupported: the kernels may compute something else than the embeddings.
    """
    embed: Any = adapter.embed
    if type(embed) is not EmbeddingSum:
        raise Unsupported(f"the adapter of {adapter.model_type!r} has another function than an EmbeddingSum as embed")
    paths = {name: path for name, path in vars(embed).items() if path is not None}
    readers = {path: _read_norm if name == "norm" else _read_table for name, path in paths.items()}
    parts = read_parts(backbone.embeddings, readers, attention=None)
    for path, module in backbone.embeddings.named_modules():
        if isinstance(module, nn.Dropout) and module.training and module.p:
            raise Unsupported(f"{path} ({type(module).__name__}) is in training mode")
    norm: Any = parts[embed.norm]
    (width,) = norm.weight.shape
    tables: dict[str, Any] = {name: parts[paths[name]] for name in TABLES if name in paths}
    for name, table in tables.items():
        if table.shape[1] != width:
            raise Unsupported(f"{paths[name]} has embeddings of width {table.shape[1]}, the norm has {width}")
    words, positions, types = (tables.get(name) for name in TABLES)
    assert words is not None
    bias = torch.zeros_like(norm.weight) if norm.bias is None else norm.bias
    return SumWeights(words, positions, types, norm.weight, bias, norm.eps)


def _read_table(module: Any) -> Tensor:
    plain = type(module) is nn.Embedding and type(module._parameters.get("weight")) is nn.Parameter
    if not plain or module.max_norm is not None:
        raise Unsupported("is not a plain Embedding without max_norm")
    return module.weight.detach()


def _read_norm(module: Any) -> Norm:
    plain = type(module) is nn.LayerNorm and bias_fits(module)
    # a norm over more than the last axis has a weight of more axes
    if not plain or type(module._parameters.get("weight")) is not nn.Parameter or len(module.normalized_shape) != 1:
        raise Unsupported("is not a plain LayerNorm with a weight")
    return read_norm(module)
