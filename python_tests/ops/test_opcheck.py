"""torch.library.opcheck on every op and back-end, with calls drawn from the declared shapes; declared writes."""

from __future__ import annotations

import random

import pytest
import torch
from support.backends import backend_params
from support.op_calls import drawn, positional

from earlyexit_kernels.backends import BACKENDS
from earlyexit_kernels.ops import schema

#: Case -> op, and what its call has.
CASES = {
    "logits": ("exit_step", {"pooling": None}),
    "first": ("exit_step", {"pooling": "first"}),
    "mean": ("exit_step", {"pooling": "mean", "has_offsets": True}),
    "none": ("exit_step", {"pooling": "none"}),
    "no rows": ("exit_step", {"rows": 0}),
    "compact": ("compact", {}),
    "compact no rows": ("compact", {"rows": 0}),
    "gather": ("gather_rows", {}),
    "gather no rows": ("gather_rows", {"rows": 0}),
    "first tokens": ("first_tokens_linear", {}),
    "first tokens no rows": ("first_tokens_linear", {"rows": 0}),
}
every_case = pytest.mark.parametrize(
    ("backend", "case"),
    [
        pytest.param(p.values[0], case, marks=p.marks)
        for case, (op, _) in CASES.items()
        for p in backend_params()
        if p.values[0] in schema._back_ends(op, "cpu")
    ],
)


def call_of(case, *, grad=False) -> tuple:
    """Return the positional arguments of a raw op; with `grad` all float tensors that it reads require gradients."""
    op, settings = CASES[case]
    arguments = drawn(op, random.Random(1), **{"rows": 4} | settings)
    for name, argument in schema.SHAPES[op].arguments.items():
        if grad and name in arguments and arguments[name].is_floating_point() and not argument.written:
            arguments[name].requires_grad_()
    return positional(op, arguments)


def test_every_op_has_a_case():
    assert {op for op, _ in CASES.values()} == set(schema.SHAPES)


@every_case
def test_writes_and_returns_what_is_declared(backend, case):
    """No other tensor is written, none that is returned shares memory, and fake tensors have the real shapes."""
    op = schema.op_of(CASES[case][0], backend)
    torch.library.opcheck(op, call_of(case, grad=True), test_utils=("test_schema", "test_faketensor"))
    names = [argument.name for argument in op._schema.arguments]
    declared = schema.SHAPES[CASES[case][0]].arguments
    assert names[: len(declared)] == list(declared)
    written = {a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    assert written == {name for name, argument in declared.items() if argument.written}


@pytest.mark.sample(4)
@every_case
def test_compiles_and_has_no_gradient(backend, case):
    op, tests = schema.op_of(CASES[case][0], backend), ("test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op, call_of(case, grad=True), test_utils=tests)


@pytest.mark.parametrize("name", schema.SHAPES)
def test_back_ends_share_one_schema(name):
    back_ends = [backend for backend in BACKENDS if backend in schema._back_ends(name, "cpu")]
    assert len(back_ends) > 1
    assert len({str(schema.op_of(name, backend)._schema).partition("(")[2] for backend in back_ends}) == 1


def test_unknown_criterion_is_refused(backend):
    arguments = ["nonsense" if isinstance(x, str) and x == "q_exit" else x for x in call_of("logits")]
    with pytest.raises((ValueError, KeyError), match="nonsense"):
        schema.op_of("exit_step", backend)(*arguments)
