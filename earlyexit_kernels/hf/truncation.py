"""The model of the first layers of another one."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


def truncated(model: Any, layers: int) -> Any:
    """Return a model with copies of the first layers of an early-exit model, and of their exits.

    Raises:
        ValueError: as `EarlyExitForSequenceClassification.truncate`.
    """
    if isinstance(layers, bool) or not isinstance(layers, int) or not 1 <= layers <= model.depth:
        raise ValueError(f"truncate: expected a number of layers from 1 to {model.depth}, got {layers!r}")
    config = copy.deepcopy(model.config)
    config.criterion = config.calibration = None
    encoder = config.backbone_config
    if getattr(encoder, "num_hidden_groups", 1) > 1:
        encoder.num_hidden_groups = _groups(model.depth, encoder.num_hidden_groups, layers)
    encoder.num_hidden_layers = layers
    if getattr(encoder, "layer_types", None) is not None:
        encoder.layer_types = encoder.layer_types[:layers]
    smaller = type(model)(config).to(device=model.device, dtype=model.dtype)
    for part, source in ((smaller.backbone, model.backbone), (smaller.heads, model.heads)):
        _copy(part, source)
    return smaller.train(model.training)


def _groups(depth: int, groups: int, layers: int) -> int:
    """Return the number of groups with which the first layers of an ALBERT keep theirs.

    Raises:
        ValueError: there is none, since the group of a layer follows from the share of the depth before it.
    """
    kept = [int(i / (depth / groups)) for i in range(layers)]
    number = kept[-1] + 1
    if [int(i / (layers / number)) for i in range(layers)] != kept:
        raise ValueError(
            f"truncate: the {groups} groups of layers of this model stand for others in a model of {layers} layers; "
            f"expected a multiple of {depth // groups} layers"
        )
    return number


@torch.no_grad()
def _copy(part: nn.Module, source: nn.Module) -> None:
    """Copy the parameters and buffers that a part has, with their dtypes, from a larger one of the same names."""
    known = {**dict(source.named_parameters()), **dict(source.named_buffers())}
    for name, tensor in [*part.named_parameters(), *part.named_buffers()]:
        tensor.data = known[name].detach().clone()
