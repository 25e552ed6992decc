"""The checks of a call of `exit_step`, the same for every back-end."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from earlyexit_kernels.criteria import Criterion, check_known
from earlyexit_kernels.criteria.base import CLASSIFICATION, MAX_PARAMS
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
)

OP = "exit_step"
POOLINGS = ("first", "mean", "none")
#: Tensors of the call that the op writes.
WRITTEN = ("row_ids", "state", "answers", "exit_layer")


def exit_rule_of(criterion: Any) -> Criterion:
    """The rule that decides for `criterion`.

    Raises:
        TypeError: not a criterion.
        ValueError: a criterion that the back-ends have no implementation of.
    """
    if not isinstance(criterion, Criterion):
        raise TypeError(f"{OP}: expected criterion to be one of earlyexit_kernels.criteria, got {criterion!r}")
    rule = criterion.exit_rule
    check_known(rule)
    return rule


@torch.compiler.disable  # it reads values and addresses, which a graph cannot hold; the op itself stays in the graph
def check_call(
    rule: Criterion, layer: int, depth: int, pooling: str, tensors: dict[str, Tensor | None]
) -> tuple[dict[str, Tensor | None], list[float]]:
    """Check a call of `exit_step`.

    Args:
        rule: the exit rule.
        layer, depth, pooling: as in `exit_step`.
        tensors: by name, each None where it is not given.

    Returns:
        The tensors, those that are only read made contiguous, and the numbers of the rule at this layer.

    Raises:
        TypeError: an argument that has to be a tensor or a whole number isn't one.
        ValueError: shapes, dtypes, devices or memory don't fit; on the CPU also row ids and offsets.
    """
    given = {name for name, tensor in tensors.items() if tensor is not None}
    _check_arguments(rule, layer, depth, pooling, given)
    params = rule.params(layer)
    if len(params) > MAX_PARAMS:
        raise ValueError(f"{OP}: expected at most {MAX_PARAMS} params of criterion {rule.name!r}, got {len(params)}")
    _check_shapes(rule, pooling, tensors)
    contiguous = {
        name: tensor if tensor is None or name in WRITTEN else tensor.contiguous() for name, tensor in tensors.items()
    }
    check_apart(
        OP,
        {name: contiguous[name] for name in WRITTEN},
        {name: tensor for name, tensor in contiguous.items() if name not in WRITTEN},
    )
    row_ids, answers, hidden, offsets = (tensors[name] for name in ("row_ids", "answers", "hidden", "offsets"))
    assert row_ids is not None and answers is not None
    if row_ids.device.type == "cpu":
        check_row_ids(OP, row_ids, requests=answers.shape[0])
        pools = hidden is not None and pooling != "none"
        if offsets is not None:
            check_offsets(OP, offsets, tokens=hidden.shape[0] if hidden is not None and pools else None)
            if pools:
                check_no_empty_row(OP, row_ids, offsets)
    return contiguous, params


def _check_arguments(rule: Criterion, layer: int, depth: int, pooling: str, given: set[str]) -> None:
    """Everything but the tensors themselves."""
    if ("hidden" in given) == ("logits" in given):
        raise ValueError(f"{OP}: expected either hidden (with weight and bias) or logits, got both or neither")
    if not ("hidden" in given) == ("weight" in given) == ("bias" in given):
        raise ValueError(f"{OP}: expected weight [C, H] and bias [C] beside hidden, and neither beside logits")
    check_whole(OP, layer=layer, depth=depth)
    if not 1 <= layer <= depth:
        raise ValueError(f"{OP}: expected 1 <= layer <= depth, got layer {layer} of {depth}; layers count from 1")
    if pooling not in POOLINGS:
        raise ValueError(f"{OP}: expected pooling to be one of {POOLINGS}, got {pooling!r}")
    if rule.needs is not None and "aux" not in given:
        raise ValueError(f"{OP}: expected aux [B], the {rule.needs} that criterion {rule.name!r} reads, got None")


def _check_shapes(rule: Criterion, pooling: str, tensors: dict[str, Tensor | None]) -> None:
    """Shapes, dtypes, layouts and devices."""
    row_ids, answers, hidden = tensors["row_ids"], tensors["answers"], tensors["hidden"]
    check_tensor(OP, "row_ids", row_ids, (None,), INT32, written=True)
    assert row_ids is not None
    (b,), device = row_ids.shape, row_ids.device
    check_row_count(OP, b)
    check_tensor(OP, "answers", answers, (None, None), FLOAT32, written=True, device=device)
    assert answers is not None
    n, c = answers.shape
    if c < 1 or (c < 2 and rule.tasks == CLASSIFICATION):
        fewest = "at least 2 classes, which the criterion compares" if c else "at least one class"
        raise ValueError(f"{OP}: expected answers [N, C] with {fewest}, got {list(answers.shape)}")
    width: int | None = None
    dtypes: tuple[torch.dtype, ...] = FLOATS
    if hidden is not None:
        tokens = b if tensors["offsets"] is None or pooling == "none" else None
        got = tuple(getattr(hidden, "shape", ()))
        width = got[-1] if len(got) == 2 else None
        check_tensor(OP, "hidden", hidden, (tokens, width), FLOATS, device=device)
        dtypes = (hidden.dtype,)
        if width == 0:
            raise ValueError(f"{OP}: expected hidden with a number a token at least, got {list(hidden.shape)}")
    for name, shape, allowed in (
        ("state", (len(rule.initial_state(c)), n), FLOAT32),
        ("exit_layer", (n,), INT64),
        ("offsets", (b + 1,), INT32),
        ("logits", (b, c), FLOATS),
        ("weight", (c, width), dtypes),
        ("bias", (c,), dtypes),
        ("aux", (b,), FLOAT32),
    ):
        tensor = tensors[name]
        if tensor is not None:
            check_tensor(OP, name, tensor, shape, allowed, written=name in WRITTEN, device=device)
        elif name in WRITTEN:
            raise TypeError(f"{OP}: expected {name} to be a tensor, got NoneType")
