"""Changed arguments of the ops: every back-end refuses an invalid call before it writes, and answers a valid one.

`validity` tells the calls apart, from the documentation alone.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from support import oracle
from support.criterion_cases import CASES
from torch import Tensor

from deep import validity
from deep.changes import change
from deep.op_calls import BACK_ENDS, WRITTEN, batches, check_exit_step, compactions, moves
from earlyexit_kernels import ops
from earlyexit_kernels.criteria import RULES

REFUSED = (ValueError, TypeError)


def dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def copied(arguments: dict[str, Any]) -> dict[str, Any]:
    """Copy the arguments with their strides, aliases and the memory around views."""
    storages: dict[int, torch.UntypedStorage] = {}
    copies = dict(arguments)
    for name, value in arguments.items():
        if dense(value):
            storage = value.untyped_storage()
            copy = storages.setdefault(storage.data_ptr(), storage.clone())
            place = value.storage_offset(), value.shape, value.stride()
            copies[name] = torch.empty(0, dtype=value.dtype).set_(copy, *place)
    return copies


def bytes_of(arguments: dict[str, Any]) -> dict[str, bytes]:
    """Return the memory of every tensor that an op can write, the memory around views included."""
    storages = {name: value.untyped_storage() for name, value in arguments.items() if dense(value)}
    return {name: torch.empty(0, dtype=torch.uint8).set_(x).numpy().tobytes() for name, x in storages.items()}


def judge(
    op: Callable[..., Any],
    arguments: dict[str, Any],
    valid: bool | None,
    check: Callable[[dict[str, Any], Any, str], None],
) -> None:
    """Call an op on every back-end with copies of its arguments, and compare with the verdict.

    Args:
        valid: verdict of `validity`, or None where back-ends only have to agree.
        check: ``(arguments after the call, result, back-end)``; fails where the result of a valid call is wrong.
    """
    accepted = {}
    for backend in BACK_ENDS:
        after = copied(arguments)
        before = bytes_of(after)
        try:
            result = op(**{k: v for k, v in after.items() if v is not None}, backend=backend)
        except REFUSED as error:
            accepted[backend] = False
            assert bytes_of(after) == before, f"{backend} refused, but wrote before"
            assert valid is not True, f"{backend} refused a valid call: {error}"
            continue
        accepted[backend] = True
        assert valid is not False, f"{backend} accepted an invalid call"
        if valid:
            check(after, result, backend)
    assert len(set(accepted.values())) == 1, f"back-ends disagree: {accepted}"


@given(batches(), st.data())
def test_exit_step(batch, data):
    layer = data.draw(st.integers(1, len(batch.layers)))
    whole = dict.fromkeys(name for name in inspect.signature(ops.exit_step).parameters if name != "backend")
    original = whole | {"pooling": "first"} | batch.arguments(layer)
    arguments = change(data.draw, original)
    arguments = data.draw(st.just(arguments), label="arguments")
    kept = all(arguments[k] is original[k] for k in ("criterion", "layer", "depth"))

    def check(after: dict[str, Any], counts: Any, backend: str) -> None:
        if kept:
            check_exit_step(batch.rule, arguments, after, counts, backend)

    # an argument that is None is not passed
    required = ("criterion", "layer", "depth", *WRITTEN)
    if arguments["pooling"] is None:
        arguments["pooling"] = "first"
    valid = validity.exit_step(arguments) if all(arguments[k] is not None for k in required) else False
    judge(ops.exit_step, arguments, valid, check)


@given(compactions(), st.data())
def test_compact(arguments, data):
    arguments = data.draw(st.just(change(data.draw, arguments)), label="arguments")

    def check(after: dict[str, Any], planned: Any, backend: str) -> None:
        expected = oracle.compact(*(t.tolist() for t in arguments.values()))
        assert [t.tolist() for t in planned] == [list(values) for values in expected], backend

    judge(ops.compact, arguments, validity.compact(arguments), check)


@given(moves(), st.data())
def test_gather_rows(arguments, data):
    arguments = data.draw(st.just(change(data.draw, arguments)), label="arguments")

    def check(after: dict[str, Any], _: Any, backend: str) -> None:
        hidden, *places, out = arguments.values()
        expected = out.double().numpy().copy()
        oracle.gather_rows(hidden.double().numpy(), *(t.tolist() for t in places), expected)
        assert np.array_equal(after["out"].double().numpy(), expected, equal_nan=True), backend

    judge(ops.gather_rows, arguments, validity.gather_rows(arguments), check)


@given(batches(), st.data())
def test_compiled_op_without_the_checks_of_python(batch, data):
    """It may refuse or take any call, but the process goes on."""
    assume("cpp" in BACK_ENDS)
    call = dict.fromkeys(("hidden", "offsets", "weight", "bias", "logits", "aux", *WRITTEN)) | batch.arguments(1)
    rule, layer, depth, pooling = (call.pop(k, "none") for k in ("criterion", "layer", "depth", "pooling"))
    arguments = data.draw(st.just(change(data.draw, call)), label="arguments")
    with contextlib.suppress(*REFUSED, RuntimeError):
        op = ops.raw("exit_step", "cpp", "cpu")
        op(*copied(arguments).values(), rule.name, rule.params(1), pooling, layer, depth)


#: Values that are invalid for most fields of criteria.
INVALID = (float("nan"), float("inf"), -1.0, -7, "0.5", None, [], [float("nan")], {}, True, 1 + 1j, [[0.5]], object())
#: Fields that take any value of a kind: criterion and field, or a field of every criterion -> values that are valid.
ALLOWED = {"tolerance": [None], ("hidden_cosine", "threshold"): [-1.0]}


@given(st.sampled_from(sorted(RULES)), st.sampled_from(INVALID), st.data())
def test_criterion_with_an_invalid_field(name, value, data):
    criterion = CASES[name].draw(data.draw, 3, 4).criterion
    fields = {field: x for field, x in criterion.to_dict().items() if field != "name"}
    assume(set(fields) - {"normalized"})
    field = data.draw(st.sampled_from(sorted(set(fields) - {"normalized"})))
    allowed = [*ALLOWED.get(field, ()), *ALLOWED.get((name, field), ())]
    empty = field == "threshold" and value == []  # that of a model with one exit
    assume(not empty and not any(value is x or value == x for x in allowed))
    try:
        changed = type(criterion)(**(fields | {field: value}))
    except REFUSED:
        return
    raise AssertionError(f"accepted: {changed}")
