"""Checks of the inputs of a model's pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from earlyexit_kernels.core.inputs import Inputs, check_inputs
from earlyexit_kernels.core.view import embedding_weight


def check_model_inputs(model: Any, given: Inputs) -> Inputs:
    """Check the inputs of a pass, and that the backbone of the model still fits its exits.

    Args:
        model: `EarlyExitForSequenceClassification`.
        given: as passed to `forward`.

    Raises:
        ValueError, AttentionReplacedError: as for `forward`.
    """
    layers = len(model.adapter.layers(model.backbone))
    if layers != model.depth:
        raise ValueError(
            f"the backbone has {layers} layers, the model has {model.depth} exits; change the layers of the stock "
            "model and its config.num_hidden_layers before to_early_exit"
        )
    labels, classes = model.config.num_labels, model.heads.classes
    if labels != classes:
        raise ValueError(
            f"the config has {labels} labels, the exits have {classes}; set config.num_labels back, or change it in "
            "the stock model before to_early_exit"
        )
    model.heads.check_beside(embedding_weight(model.backbone))
    return check_inputs(given, model.adapter, model.backbone)


def check_batch(model: Any, caller: str, batch: Mapping[str, Any]) -> Inputs:
    """Check the inputs of a pass that runs in eval mode only, and return them.

    Args:
        model: `EarlyExitForSequenceClassification`.
        caller: name of the function that was called, for messages.
        batch: keyword arguments; None stands for an input that is not given.

    Raises:
        RuntimeError: the model is in train mode.
        ValueError, AttentionReplacedError: an unknown input, or as for `forward`.
    """
    if model.training:
        raise RuntimeError(f"{caller}: expected the model in eval mode, got train mode; call model.eval() first")
    given = {name: value for name, value in batch.items() if value is not None}
    if unknown := sorted(set(given) - set(Inputs._fields)):
        raise ValueError(f"{caller}: expected inputs among {Inputs._fields}, got {unknown}")
    return check_model_inputs(model, Inputs(**{"input_ids": None, **given}))


def refuse_states(config: Any, hidden_states: bool | None, attentions: bool | None) -> None:
    """Refuse a pass that is asked for hidden states or attentions.

    Args:
        config: of the model, for the defaults.
        hidden_states, attentions: arguments of `forward`.

    Raises:
        ValueError: the arguments, or the defaults, ask for them.
    """
    asked = config.output_hidden_states if hidden_states is None else hidden_states
    if asked or (config.output_attentions if attentions is None else attentions):
        raise ValueError(
            "output_hidden_states and output_attentions are not supported: rows leave at different layers, so "
            "there is no full set to return; call model.backbone instead"
        )
