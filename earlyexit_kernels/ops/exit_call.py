"""The arguments of `exit_step`: their names, their shapes, and their checks, the same for every back-end."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from earlyexit_kernels.criteria import Criterion, check_known
from earlyexit_kernels.criteria.base import MAX_PARAMS, refused_criterion_message
from earlyexit_kernels.ops.shapes import FLOAT32, FLOATS, INT32, INT64, Argument, Shapes, not_traced
from earlyexit_kernels.ops.values import (
    MAX_INT32,
    check_no_empty_row,
    check_offsets,
    check_row_count,
    check_row_ids,
)
from earlyexit_kernels.types import CLASSIFICATION

POOLINGS = ("first", "mean", "none")

EXIT_STEP = Shapes(
    {
        "hidden": Argument("T, H", FLOATS, optional=True),
        "offsets": Argument("B + 1", INT32, optional=True),
        "weight": Argument("C, H", "hidden", optional=True),
        "bias": Argument("C", "hidden", optional=True),
        "logits": Argument("B, C", FLOATS, optional=True),
        "aux": Argument("B", FLOAT32, optional=True),
        "row_ids": Argument("B", INT32, written=True),
        "state": Argument("K, N", FLOAT32, written=True),
        "answers": Argument("N, C", FLOAT32, written=True),
        "exit_layer": Argument("N", INT64, written=True),
    }
)


class ExitCall(NamedTuple):
    """The arguments of the raw op, in the order of its schema; `ops.exit_step` documents them.

    Attributes:
        criterion: name of the exit rule.
        params: its parameters at this layer.
    """

    hidden: Tensor | None
    offsets: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    logits: Tensor | None
    aux: Tensor | None
    row_ids: Tensor
    state: Tensor
    answers: Tensor
    exit_layer: Tensor
    criterion: str
    params: Sequence[float]
    pooling: str
    layer: int
    depth: int


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
    _check_form(op, rule, call)
    params = rule.params(call.layer)
    if len(params) > MAX_PARAMS:
        raise ValueError(f"{op}: expected at most {MAX_PARAMS} params of criterion {rule.name!r}, got {len(params)}")
    _check_shapes(op, rule, call)
    call = call._replace(
        **EXIT_STEP.ready(op, call._asdict()),
        params=params,
        pooling="none" if call.hidden is None else call.pooling,
    )
    if call.row_ids.device.type == "cpu":
        _check_values(op, call)
    return call


def _check_form(op: str, rule: Criterion, call: ExitCall) -> None:
    """Check which tensors are given, and the arguments that are none."""
    fused = call.hidden is not None
    if fused == (call.logits is not None):
        raise ValueError(f"{op}: expected either hidden (with weight and bias) or logits, got both or neither")
    if not fused == (call.weight is not None) == (call.bias is not None):
        raise ValueError(f"{op}: expected weight [C, H] and bias [C] beside hidden, and neither beside logits")
    for name in ("layer", "depth"):
        _check_whole(op, name, getattr(call, name))
    if not 1 <= call.layer <= call.depth:
        raise ValueError(
            f"{op}: expected 1 <= layer <= depth, got layer {call.layer} of {call.depth}; layers count from 1"
        )
    if call.pooling not in POOLINGS:
        raise ValueError(f"{op}: expected pooling to be one of {POOLINGS}, got {call.pooling!r}")
    if rule.needs is not None and call.aux is None:
        raise ValueError(f"{op}: expected aux [B], the {rule.needs} that criterion {rule.name!r} reads, got None")


def _check_whole(op: str, name: str, value: Any) -> None:
    """Raise TypeError if a value is not a whole number, ValueError if int32 cannot hold it."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{op}: expected {name} to be a whole number, got {value!r}")
    if abs(int(value)) > MAX_INT32:
        raise ValueError(f"{op}: expected {name} to be at most {MAX_INT32} in magnitude, got {value}")


def _check_shapes(op: str, rule: Criterion, call: ExitCall) -> None:
    """Check the tensors against their declaration; ids and answers decide what most letters stand for."""
    given = call._asdict()
    decisive = ("row_ids", "answers")
    sizes = EXIT_STEP.check(op, given, names=decisive)
    rows, classes = sizes["B"], sizes["C"]
    check_row_count(op, rows)
    if classes < 1 or (classes < 2 and rule.tasks == CLASSIFICATION):
        minimum = "at least 2 classes, which the criterion compares" if classes else "at least one class"
        raise ValueError(f"{op}: expected answers [N, C] with {minimum}, got {list(call.answers.shape)}")
    sizes["K"] = len(rule.initial_state(classes))
    if call.offsets is None or call.pooling == "none":
        sizes["T"] = rows
    EXIT_STEP.check(op, given, sizes=sizes, names=(*decisive, *EXIT_STEP.arguments))
    if call.hidden is not None and not call.hidden.shape[1]:
        raise ValueError(f"{op}: expected hidden of width >= 1, got {list(call.hidden.shape)}")


def _check_values(op: str, call: ExitCall) -> None:
    """Check the values of row ids and offsets on the CPU."""
    check_row_ids(op, call.row_ids, requests=call.answers.shape[0])
    if call.offsets is None:
        return
    pools = call.pooling != "none" and call.hidden is not None
    check_offsets(op, call.offsets, tokens=call.hidden.shape[0] if pools and call.hidden is not None else None)
    if pools:
        check_no_empty_row(op, call.row_ids, call.offsets)
