"""The inputs of a forward pass, checked before any other work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from earlyexit_kernels.backbones import BackboneAdapter
from earlyexit_kernels.core.attention import check_attention, check_windows
from earlyexit_kernels.core.view import Inputs, View, embedding_weight
from earlyexit_kernels.types import INTEGER_DTYPES


def check_inputs(given: Inputs, adapter: BackboneAdapter, backbone: Any, *, check_values: bool = True) -> Inputs:
    """Check the inputs of a forward pass and return them with `input_ids` as int64.

    Args:
        given: as passed to `forward`: tensors, None, or anything else.
        adapter, backbone: the encoder.
        check_values: also check that ids are within their embeddings; on the CPU only, where reading them does not
            synchronise.

    Raises:
        ValueError: names the argument, what was expected and what was given. Negative mask values, as in additive
            masks, and NaN are refused on the CPU.
        ValueError: the layers have other windows than the config says.
        AttentionReplacedError: the backbone has another attention than the packed one.
    """
    check_attention(backbone.config._attn_implementation, adapter)
    check_windows(adapter, backbone)
    named = dict(zip(Inputs._fields, given, strict=True))
    for name, value in named.items():
        if value is not None and not isinstance(value, Tensor):
            raise ValueError(not_a_tensor_message(name, value))
    ids, mask = given.input_ids, given.attention_mask
    if ids is None:
        raise ValueError("input_ids: expected integers of shape [N, S], got None")
    shape, max_length, device = ids.shape, adapter.longest(backbone.config), embedding_weight(backbone).device
    if ids.dim() != 2:
        single = "; for one row pass input_ids[None]" if ids.dim() == 1 else ""
        raise ValueError(f"input_ids: expected integers of shape [N, S], got shape {list(shape)}{single}")
    if shape[0] and not shape[1]:
        raise ValueError(f"input_ids: expected at least one token a row, got shape {list(shape)}")
    if shape[1] > max_length:
        raise ValueError(
            f"input_ids: a row may have {max_length} tokens in this model, got {shape[1]}; tokenize with "
            f"truncation=True, max_length={max_length}"
        )
    if mask is not None:
        _check_mask(mask, shape)
    sizes = _embedding_sizes(backbone) if check_values else {}
    for name, value in named.items():
        if value is None:
            continue
        if value.device != device:
            raise ValueError(f"{name} is on {value.device}, the model on {device}; move one of them")
        if name != "attention_mask":
            _check_ids(name, value, shape, sizes.get(name))
    return given._replace(input_ids=ids.long())


def not_a_tensor_message(name: str, value: Any) -> str:
    """Return the error message for an input that is not a tensor, with what to pass."""
    cure = 'make tensors of text with tokenizer(texts, padding=True, return_tensors="pt")'
    if isinstance(value, Mapping):
        cure = "pass its entries as keyword arguments, **batch"
    return f"{name}: expected a tensor [N, S], got {type(value).__name__}; {cure}"


def refuse_other_arguments(given: Mapping[str, Any]) -> None:
    """Refuse arguments of stock models that are not supported; None and False pass.

    Raises:
        TypeError: names them and the supported ones.
    """
    asked = [name for name, value in given.items() if value is not None and value is not False]
    if asked:
        raise TypeError(
            "forward: expected input_ids, attention_mask, token_type_ids, position_ids, labels, output_all_logits or "
            f"return_dict, got {', '.join(asked)}; an early-exit model packs token ids and does not take embeddings, "
            "head masks or caches. Leave them out, or pass None"
        )


def _embedding_sizes(backbone: Any) -> dict[str, int | None]:
    """Return the number of embeddings for each argument that holds ids; None where it is unknown."""
    return {
        "input_ids": backbone.get_input_embeddings().num_embeddings,
        # 0 in a family without token types, which ignores them
        "token_type_ids": getattr(backbone.config, "type_vocab_size", None) or None,
        "position_ids": backbone.config.max_position_embeddings,
    }


def _check_mask(mask: Tensor, shape: torch.Size) -> None:
    if mask.shape != shape:
        raise ValueError(f"attention_mask: expected the shape of input_ids {list(shape)}, got {list(mask.shape)}")
    readable = mask.device.type == "cpu" and not torch.compiler.is_compiling()
    if not readable or not mask.numel() or mask.dtype in (torch.bool, torch.uint8):
        return
    low = float(mask.min())
    if not low >= 0:
        got = "NaN" if math.isnan(low) else "negative numbers; pass mask >= 0"
        raise ValueError(f"attention_mask: expected 1 for a token and 0 for none, got {got}")


def _check_ids(name: str, ids: Tensor, shape: torch.Size, size: int | None) -> None:
    """Check for integers in [0, size), one for each token, or one row of them for all rows."""
    if ids.dtype not in INTEGER_DTYPES:
        raise ValueError(f"{name}: expected integers, got {ids.dtype}; pass {name}.long() if these are ids")
    if tuple(ids.shape) not in (tuple(shape), (1, shape[1])):
        raise ValueError(f"{name}: expected the shape of input_ids {list(shape)}, got {list(ids.shape)}")
    if size is None or ids.device.type != "cpu" or not ids.numel():
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= size:
        raise ValueError(f"{name}: expected ids in [0, {size - 1}], got {low if low < 0 else high}")


def check_pass(view: View, given: Inputs) -> Inputs:
    """Check the inputs of a pass, and that the backbone of the model still fits its exits.

    Args:
        view: of the model.
        given: as passed to `forward`.

    Raises:
        ValueError, AttentionReplacedError: as `check_inputs`, or the backbone or the config no longer fits the exits.
    """
    layers, heads = len(view.layers), view.heads
    if layers != heads.depth:
        raise ValueError(
            f"the backbone has {layers} layers, the model has {heads.depth} exits; change the layers of the stock "
            "model and its config.num_hidden_layers before to_early_exit"
        )
    if view.classes != heads.classes:
        raise ValueError(
            f"the config has {view.classes} labels, the exits have {heads.classes}; set config.num_labels back, or "
            "change it in the stock model before to_early_exit"
        )
    heads.check_beside(embedding_weight(view.backbone))
    return check_inputs(given, view.adapter, view.backbone)


def check_batch(view: View, caller: str, batch: Mapping[str, Any], *, training: bool) -> Inputs:
    """Check the inputs of a pass that runs in eval mode only, and return them.

    Args:
        view: of the model.
        caller: name of the function that was called, for messages.
        batch: keyword arguments; None stands for an input that is not given.
        training: whether the model is in train mode.

    Raises:
        RuntimeError: the model is in train mode.
        ValueError, AttentionReplacedError: an unknown input, or as `check_pass`.
    """
    if training:
        raise RuntimeError(f"{caller}: expected the model in eval mode, got train mode; call model.eval() first")
    given = {name: value for name, value in batch.items() if value is not None}
    if unknown := sorted(set(given) - set(Inputs._fields)):
        raise ValueError(f"{caller}: expected inputs among {Inputs._fields}, got {unknown}")
    return check_pass(view, Inputs(**{"input_ids": None, **given}))


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
