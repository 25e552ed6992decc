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
    groups = getattr(encoder, "num_hidden_groups", 1)
    if groups > 1 and layers < model.depth:
        raise ValueError(
            f"truncate: the layers of this model are {groups} groups whose places depend on the depth; expected one "
            "group, or all layers"
        )
    encoder.num_hidden_layers = layers
    if getattr(encoder, "layer_types", None) is not None:
        encoder.layer_types = encoder.layer_types[:layers]
    smaller = type(model)(config).to(device=model.device, dtype=model.dtype)
    for part, source in ((smaller.backbone, model.backbone), (smaller.heads, model.heads)):
        _copy(part, source)
    return smaller.train(model.training)


@torch.no_grad()
def _copy(part: nn.Module, source: nn.Module) -> None:
    """Copy the parameters and buffers that a part has, with their dtypes, from a larger one of the same names."""
    known = {**dict(source.named_parameters()), **dict(source.named_buffers())}
    for name, tensor in [*part.named_parameters(), *part.named_buffers()]:
        tensor.data = known[name].detach().clone()
