"""Checks of the arguments of `exit_step`, the same for every back-end."""

from __future__ import annotations

from typing import Any

import torch

from earlyexit_kernels.criteria import Criterion, check_known
from earlyexit_kernels.criteria.base import MAX_PARAMS, refused_criterion_message
from earlyexit_kernels.ops.checks import (
    FLOAT32,
    FLOATS,
    INT32,
    INT64,
    check_apart,
    check_no_empty_row,
    check_offsets,
    check_row_count,
    check_row_ids,
    check_tensor,
    check_whole,
    not_traced,
)
from earlyexit_kernels.ops.exit_call import ExitCall
from earlyexit_kernels.types import CLASSIFICATION

POOLINGS = ("first", "mean", "none")
#: Tensors of a call by whether the op writes them.
READ = ("hidden", "offsets", "weight", "bias", "logits", "aux")
WRITTEN = ("row_ids", "state", "answers", "exit_layer")


def exit_rule_of(op: str, criterion: Any) -> Criterion:
    """Return the rule that decides for `criterion`.

    Raises:
        TypeError: not a criterion.
        ValueError: no back-end implements the criterion.
    """
    if not isinstance(criterion, Criterion):
        raise TypeError(refused_criterion_message(op, criterion))
    rule = criterion.exit_rule
    check_known(rule)
    return rule


@not_traced
def checked_call(op: str, rule: Criterion, call: ExitCall) -> ExitCall:
    """Check the arguments of `op` and complete them.

    Args:
        op: for the messages.
        rule: the exit rule.
        call: the arguments; `params` is not read.

    Returns:
        The call with the tensors that are only read made contiguous and the parameters of the rule at its layer.

    Raises:
        TypeError: an argument is not a tensor or not an integer where one is required.
        ValueError: invalid shapes, dtypes, devices or overlapping memory; on the CPU also invalid row ids and offsets.
    """
    _check_arguments(op, rule, call)
    params = rule.params(call.layer)
    if len(params) > MAX_PARAMS:
        raise ValueError(f"{op}: expected at most {MAX_PARAMS} params of criterion {rule.name!r}, got {len(params)}")
    _check_shapes(op, rule, call)
    read: dict[str, Any] = {name: x if (x := getattr(call, name)) is None else x.contiguous() for name in READ}
    check_apart(op, {name: getattr(call, name) for name in WRITTEN}, read)
    if call.row_ids.device.type == "cpu":
        _check_rows(op, call)
    return call._replace(**read, params=params, pooling="none" if call.hidden is None else call.pooling)


def _check_arguments(op: str, rule: Criterion, call: ExitCall) -> None:
    """Check everything except the tensors' shapes, dtypes and values."""
    fused = call.hidden is not None
    if fused == (call.logits is not None):
        raise ValueError(f"{op}: expected either hidden (with weight and bias) or logits, got both or neither")
    if not fused == (call.weight is not None) == (call.bias is not None):
        raise ValueError(f"{op}: expected weight [C, H] and bias [C] beside hidden, and neither beside logits")
    check_whole(op, layer=call.layer, depth=call.depth)
    if not 1 <= call.layer <= call.depth:
        raise ValueError(
            f"{op}: expected 1 <= layer <= depth, got layer {call.layer} of {call.depth}; layers count from 1"
        )
    if call.pooling not in POOLINGS:
        raise ValueError(f"{op}: expected pooling to be one of {POOLINGS}, got {call.pooling!r}")
    if rule.needs is not None and call.aux is None:
        raise ValueError(f"{op}: expected aux [B], the {rule.needs} that criterion {rule.name!r} reads, got None")


def _check_rows(op: str, call: ExitCall) -> None:
    """Check the values of row ids and offsets on the CPU."""
    check_row_ids(op, call.row_ids, requests=call.answers.shape[0])
    if call.offsets is None:
        return
    pools = call.hidden is not None and call.pooling != "none"
    check_offsets(op, call.offsets, tokens=call.hidden.shape[0] if call.hidden is not None and pools else None)
    if pools:
        check_no_empty_row(op, call.row_ids, call.offsets)


def _check_shapes(op: str, rule: Criterion, call: ExitCall) -> None:
    """Check shapes, dtypes, layouts and devices."""
    check_tensor(op, "row_ids", call.row_ids, (None,), INT32, written=True)
    (b,), device = call.row_ids.shape, call.row_ids.device
    check_row_count(op, b)
    check_tensor(op, "answers", call.answers, (None, None), FLOAT32, written=True, device=device)
    n, c = call.answers.shape
    if c < 1 or (c < 2 and rule.tasks == CLASSIFICATION):
        minimum = "at least 2 classes, which the criterion compares" if c else "at least one class"
        raise ValueError(f"{op}: expected answers [N, C] with {minimum}, got {list(call.answers.shape)}")
    width: int | None = None
    dtypes: tuple[torch.dtype, ...] = FLOATS
    if call.hidden is not None:
        tokens = b if call.offsets is None or call.pooling == "none" else None
        got = tuple(getattr(call.hidden, "shape", ()))
        width = got[-1] if len(got) == 2 else None
        check_tensor(op, "hidden", call.hidden, (tokens, width), FLOATS, device=device)
        dtypes = (call.hidden.dtype,)
        if width == 0:
            raise ValueError(f"{op}: expected hidden of width >= 1, got {list(call.hidden.shape)}")
    for name, shape, allowed in (
        ("state", (len(rule.initial_state(c)), n), FLOAT32),
        ("exit_layer", (n,), INT64),
        ("offsets", (b + 1,), INT32),
        ("logits", (b, c), FLOATS),
        ("weight", (c, width), dtypes),
        ("bias", (c,), dtypes),
        ("aux", (b,), FLOAT32),
    ):
        tensor = getattr(call, name)
        if tensor is not None:
            check_tensor(op, name, tensor, shape, allowed, written=name in WRITTEN, device=device)
        elif name in WRITTEN:
            raise TypeError(f"{op}: expected {name} to be a tensor, got NoneType")
