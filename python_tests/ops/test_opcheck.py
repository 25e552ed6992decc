"""torch.library.opcheck on every op and back-end, with calls drawn from the declared shapes; declared writes."""

from __future__ import annotations

import random

import pytest
import torch
from support.backends import backend_params
from support.op_calls import drawn, positional
from torch._subclasses.fake_tensor import FakeTensorMode

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


@pytest.mark.sample(4)
@every_case
def test_opcheck(backend, case):
    torch.library.opcheck(schema.op_of(CASES[case][0], backend), call_of(case, grad=True))


@every_case
def test_writes_what_is_declared_and_returns_new_memory(backend, case):
    op, shapes = schema.op_of(CASES[case][0], backend), schema.SHAPES[CASES[case][0]].arguments
    arguments = call_of(case)
    before = [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]
    returned = op(*arguments)
    returned = returned if isinstance(returned, tuple) else (returned,)
    names = [argument.name for argument in op._schema.arguments]
    assert names[: len(shapes)] == list(shapes)
    changed = {
        name
        for name, old, new in zip(names, before, arguments, strict=True)
        if isinstance(new, torch.Tensor) and not torch.equal(old, new)
    }
    declared = {a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    assert declared == {name for name, argument in shapes.items() if argument.written}
    assert changed == (set() if "no rows" in case else declared)
    memory = {x.untyped_storage().data_ptr() for x in arguments if isinstance(x, torch.Tensor) and x.numel()}
    assert all(x.untyped_storage().data_ptr() not in memory for x in returned if x is not None and x.numel())


@every_case
def test_fake_tensors_have_the_real_shapes_and_dtypes(backend, case):
    op = schema.op_of(CASES[case][0], backend)
    real = op(*call_of(case))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = op(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in call_of(case)))
    real, fake = (x if isinstance(x, tuple) else (x,) for x in (real, fake))
    described = [[x is not None and (x.shape, x.dtype, x.device) for x in returned] for returned in (real, fake)]
    assert described[0] == described[1]


@pytest.mark.parametrize("name", schema.SHAPES)
def test_back_ends_share_one_schema(name):
    back_ends = [backend for backend in BACKENDS if backend in schema._back_ends(name, "cpu")]
    assert len(back_ends) > 1
    assert len({str(schema.op_of(name, backend)._schema).partition("(")[2] for backend in back_ends}) == 1


def test_unknown_criterion_is_refused(backend):
    arguments = ["nonsense" if isinstance(x, str) and x == "q_exit" else x for x in call_of("logits")]
    with pytest.raises((ValueError, KeyError), match="nonsense"):
        schema.op_of("exit_step", backend)(*arguments)
