"""The model's input, checked before any work: what is wrong is said in one sentence."""

from __future__ import annotations

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
    vocabulary: int,
    first_token: bool,
) -> Tensor:
    """Validate the input of a forward and return `input_ids` as int64.

    Args:
        input_ids: ``[N, S]`` integers in ``[0, vocabulary)``.
        attention_mask: ``[N, S]``.
        token_type_ids, position_ids: ``[N, S]`` or ``[1, S]`` integers.
        device: of the model.
        longest: tokens a row may have.
        vocabulary: number of token ids; checked on the CPU, where looking costs no synchronisation.
        first_token: whether the heads read each row's first token.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    if input_ids is None or input_ids.dim() != 2:
        got = "None" if input_ids is None else f"shape {list(input_ids.shape)}"
        raise ValueError(f"input_ids: expected integers of shape [N, S], got {got}")
    shape = input_ids.shape
    if input_ids.dtype not in _INTEGERS:
        raise ValueError(f"input_ids: expected integers, got {input_ids.dtype}")
    if shape[0] and not shape[1]:
        raise ValueError(f"input_ids: expected at least one token a row, got shape {list(shape)}")
    if shape[1] > longest:
        raise ValueError(f"input_ids: a row may have {longest} tokens in this model, got {shape[1]}; truncate the text")
    if attention_mask is not None and attention_mask.shape != shape:
        raise ValueError(
            f"attention_mask: expected the shape of input_ids {list(shape)}, got {list(attention_mask.shape)}"
        )
    for name, ids in (("token_type_ids", token_type_ids), ("position_ids", position_ids)):
        if ids is None:
            continue
        if ids.dtype not in _INTEGERS or tuple(ids.shape) not in ((1, shape[1]), tuple(shape)):
            raise ValueError(f"{name}: expected integers of shape {list(shape)}, got {ids.dtype} {list(ids.shape)}")
    for name, tensor in (
        ("input_ids", input_ids),
        ("attention_mask", attention_mask),
        ("token_type_ids", token_type_ids),
        ("position_ids", position_ids),
    ):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the model on {device}; move one of them")
    if shape[0] and device.type == "cpu":
        low, high = (int(v) for v in input_ids.aminmax())
        if low < 0 or high >= vocabulary:
            raise ValueError(f"input_ids: expected ids in [0, {vocabulary - 1}], got {low if low < 0 else high}")
    if first_token and attention_mask is not None and shape[0]:
        _check_first_column(attention_mask)
    return input_ids.long()


def _check_first_column(attention_mask: Tensor) -> None:
    """Refuse left padding where the heads read the first token; an all-padding row is let through."""
    hidden_first = attention_mask[:, 0] == 0
    if bool(hidden_first.any()) and bool((attention_mask[hidden_first] != 0).any()):
        raise ValueError(
            "attention_mask: the first token of a row is masked, but these exits read it; pad on the right, or convert "
            "with pooling='mean'"
        )
