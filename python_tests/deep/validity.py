"""Decide whether a call of an op is valid by its documentation, independently of the package.

Each predicate returns True, False, or None if the documentation does not say; then the back-ends have to agree.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from support.criterion_cases import CLASSWISE
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
POOLINGS = ("first", "mean", "none")
MAX_INT = 2**31 - 1


def fits(tensor: Any, shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...]) -> bool:
    """Return whether `tensor` is a dense CPU tensor of this shape (None for any size) and one of these dtypes."""
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
        return False
    sizes = len(tensor.shape) == len(shape) and all(
        want in (None, have) for want, have in zip(shape, tensor.shape, strict=True)
    )
    return sizes and tensor.dtype in dtypes


def spans(tensor: Tensor) -> tuple[int, int]:
    """Return the first address of a dense tensor and the address after its last byte."""
    if not tensor.numel():
        return 0, 0
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()


def overlap(written: Tensor, others: list[Tensor]) -> bool:
    """Return whether a written tensor shares memory with another one."""
    start, end = spans(written)
    return any(start < stop and begin < end for begin, stop in map(spans, others))


def valid_offsets(offsets: Tensor, tokens: int | None) -> bool:
    """Return whether offsets start at 0 or above, do not decrease and end within the tokens."""
    values = offsets.tolist()
    inside = tokens is None or values[-1] <= tokens
    return values[0] >= 0 and inside and all(a <= b for a, b in itertools.pairwise(values))


def whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def exit_step(given: dict[str, Any]) -> bool | None:
    """Judge a call of `ops.exit_step`; `given` has all arguments, with None for omitted ones."""
    criterion, layer, depth = given["criterion"], given["layer"], given["depth"]
    row_ids, state, answers, exit_layer = (given[k] for k in ("row_ids", "state", "answers", "exit_layer"))
    hidden, weight, bias, logits = (given[k] for k in ("hidden", "weight", "bias", "logits"))
    offsets, aux, pooling = given["offsets"], given["aux"], given["pooling"]
    if not hasattr(criterion, "initial_state") or isinstance(criterion, type):
        return False
    if not (whole(layer) and whole(depth) and 1 <= layer <= depth <= MAX_INT) or pooling not in POOLINGS:
        return False
    if not fits(row_ids, (None,), (torch.int32,)) or not fits(answers, (None, None), (torch.float32,)):
        return False
    rows, (requests, classes) = row_ids.shape[0], answers.shape
    width = len(criterion.initial_state(classes))
    if not fits(state, (width, requests), (torch.float32,)) or not fits(exit_layer, (requests,), (torch.int64,)):
        return False
    if classes < 1 or not all(t.is_contiguous() for t in (row_ids, state, answers, exit_layer)):
        return False
    if offsets is not None and not fits(offsets, (rows + 1,), (torch.int32,)):
        return False
    if (criterion.needs is not None and aux is None) or (aux is not None and not fits(aux, (rows,), (torch.float32,))):
        return False
    if not _inputs(hidden, weight, bias, logits, rows, classes, None if offsets is None else pooling):
        return False
    pools = hidden is not None and pooling != "none" and offsets is not None
    if offsets is not None and not valid_offsets(offsets, hidden.shape[0] if pools else None):
        return False
    present = [(i, n) for i, n in enumerate(row_ids.tolist()) if n >= 0]
    named = [n for _, n in present]
    if any(n >= requests for n in named) or len(set(named)) < len(named):
        return False
    if pools and any(offsets[i] == offsets[i + 1] for i, _ in present):
        return False
    written = [row_ids, state, answers, exit_layer]
    read = [t for t in (hidden, weight, bias, logits, offsets, aux) if t is not None]
    for k, tensor in enumerate(written):
        if overlap(tensor, [*written[:k], *written[k + 1 :], *read]):
            return False
    if (row_ids < -1).any() or (classes == 1 and criterion.name in CLASSWISE):
        return None
    return True


def _inputs(hidden: Any, weight: Any, bias: Any, logits: Any, rows: int, classes: int, pooling: str | None) -> bool:
    """Return whether the inputs are valid logits, or hidden states with a head; `pooling` is None without offsets."""
    if logits is not None:
        return hidden is None and weight is None and bias is None and fits(logits, (rows, classes), FLOATS)
    tokens = rows if pooling in (None, "none") else None
    if not fits(hidden, (tokens, None), FLOATS) or not hidden.shape[1]:
        return False
    dtype = (hidden.dtype,)
    return fits(weight, (classes, hidden.shape[1]), dtype) and fits(bias, (classes,), dtype)


def compact(given: dict[str, Any]) -> bool | None:
    """Judge a call of `ops.compact`."""
    row_ids, offsets = given["row_ids"], given["offsets"]
    if not fits(row_ids, (None,), (torch.int32,)) or not fits(offsets, (row_ids.shape[0] + 1,), (torch.int32,)):
        return False
    if not valid_offsets(offsets, None):
        return False
    live = row_ids[row_ids >= 0].tolist()
    return None if (row_ids < -1).any() or len(set(live)) < len(live) else True


def gather_rows(given: dict[str, Any]) -> bool | None:
    """Judge a call of `ops.gather_rows`."""
    hidden, offsets, source, new_offsets, out = (
        given[k] for k in ("hidden", "offsets", "source", "new_offsets", "out")
    )
    if not fits(hidden, (None, None), FLOATS) or not fits(out, (None, hidden.shape[1]), (hidden.dtype,)):
        return False
    if not fits(offsets, (None,), (torch.int32,)) or not fits(source, (None,), (torch.int32,)):
        return False
    if not len(offsets) or not fits(new_offsets, (len(source) + 1,), (torch.int32,)) or not out.is_contiguous():
        return False
    if not valid_offsets(offsets, hidden.shape[0]) or not valid_offsets(new_offsets, out.shape[0]):
        return False
    lengths, new_lengths = offsets.diff().tolist(), new_offsets.diff().tolist()
    for j, i in enumerate(source.tolist()):
        if i >= len(lengths) or (i >= 0 and lengths[i] != new_lengths[j]):
            return False
    if overlap(out, [hidden, offsets, source, new_offsets]):
        return False
    shares = out.untyped_storage().data_ptr() == hidden.untyped_storage().data_ptr() and out.numel() > 0
    return None if shares or (source < -1).any() else True
