"""The model's input, checked before any work: what is wrong is said in one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_inputs(
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    *,
    device: torch.device,
    longest: int,
    limits: Mapping[str, int | None],
) -> Tensor:
    """Validate the input of a forward and return `input_ids` as int64.

    Args:
        input_ids: ``[N, S]`` integers.
        attention_mask: ``[N, S]``; what it says is read by `packing.pack`. Negative numbers, which masks to add to
            scores have, and NaN are refused; checked on the CPU.
        token_type_ids, position_ids: ``[N, S]`` or ``[1, S]`` integers.
        device: of the model.
        longest: tokens a row may have.
        limits: argument -> how many ids its embedding has; checked on the CPU, where looking costs no synchronisation.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    given = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "token_type_ids": token_type_ids,
        "position_ids": position_ids,
    }
    for name, value in given.items():
        if value is not None and not isinstance(value, Tensor):
            raise ValueError(f"{name}: expected a tensor [N, S], got {type(value).__name__}")
    if input_ids is None:
        raise ValueError("input_ids: expected integers of shape [N, S], got None")
    shape = input_ids.shape
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids: expected integers of shape [N, S], got shape {list(shape)}")
    if shape[0] and not shape[1]:
        raise ValueError(f"input_ids: expected at least one token a row, got shape {list(shape)}")
    if shape[1] > longest:
        raise ValueError(f"input_ids: a row may have {longest} tokens in this model, got {shape[1]}; truncate the text")
    if attention_mask is not None:
        _check_mask(attention_mask, shape)
    for name, value in given.items():
        if value is None:
            continue
        if value.device != device:
            raise ValueError(f"{name} is on {value.device}, the model on {device}; move one of them")
        if name != "attention_mask":
            _check_ids(name, value, shape, limits.get(name))
    return input_ids.long()


def refuse_other_arguments(given: Mapping[str, Any]) -> None:
    """Refuse arguments of stock models that an early-exit model lacks; None and False, which ask for nothing, pass.

    Raises:
        TypeError: naming them, and what is supported.
    """
    asked = [name for name, value in given.items() if value is not None and value is not False]
    if asked:
        raise TypeError(
            "forward: expected input_ids, attention_mask, token_type_ids, position_ids, labels, output_all_logits or "
            f"return_dict, got {', '.join(asked)}; an early-exit model packs token ids, and supports no embeddings, "
            "head masks or caches given from outside. Leave them out, or pass None"
        )


def _check_mask(mask: Tensor, shape: torch.Size) -> None:
    """Of the batch's shape, and none of those that are added to scores."""
    if mask.shape != shape:
        raise ValueError(f"attention_mask: expected the shape of input_ids {list(shape)}, got {list(mask.shape)}")
    seen = mask.device.type == "cpu" and not torch.compiler.is_compiling()
    if not seen or not mask.numel() or mask.dtype in (torch.bool, torch.uint8):
        return
    low = float(mask.min())
    if not low >= 0:
        got = "NaN" if math.isnan(low) else "negative numbers; pass mask >= 0"
        raise ValueError(f"attention_mask: expected 1 for a token and 0 for none, got {got}")


def _check_ids(name: str, ids: Tensor, shape: torch.Size, limit: int | None) -> None:
    """Integers of the batch's shape (or one row for all), each below `limit`."""
    if ids.dtype not in _INTEGERS:
        raise ValueError(f"{name}: expected integers, got {ids.dtype}")
    if tuple(ids.shape) not in (tuple(shape), (1, shape[1])):
        raise ValueError(f"{name}: expected the shape of input_ids {list(shape)}, got {list(ids.shape)}")
    if limit is None or ids.device.type != "cpu" or not ids.numel():
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= limit:
        raise ValueError(f"{name}: expected ids in [0, {limit - 1}], got {low if low < 0 else high}")
