"""torch.library.opcheck on every op and back-end, and the declared mutations."""

from __future__ import annotations

import pytest
import torch
from support.backends import backend_params

from earlyexit_kernels.backends import BACKENDS
from earlyexit_kernels.criteria import RULES
from earlyexit_kernels.ops import schema

OPS = torch.ops.earlyexit_kernels
N, C, H = 5, 3, 8


def exit_step_arguments(source="logits", *, rows=4, grad=False, criterion="patience", layer=2, depth=2) -> tuple:
    """Positional arguments of exit_step; the second layer of patience 1, so that all mutable tensors change."""
    params, state = {
        "patience": ([1.0, -1.0], [[0.0] * N, [0.0] * N]),
        "q_exit": ([0.4], [[0.8] * N]),
        "dact": ([1.0, 0.0], [[0.5] * N] * (1 + C)),
        "full_depth": ([], torch.zeros(0, N).tolist()),
    }[criterion]
    hidden = weight = bias = offsets = logits = None
    if source == "logits":
        logits = torch.randn(rows, C, requires_grad=grad)
    else:
        offsets = torch.arange(0, 2 * rows + 1, 2, dtype=torch.int32)
        hidden = torch.randn(rows if source == "none" else 2 * rows, H, requires_grad=grad)
        weight, bias = torch.randn(C, H, requires_grad=grad), torch.randn(C, requires_grad=grad)
    aux = torch.rand(rows) if criterion in ("q_exit", "dact") else None
    row_ids, answers = torch.arange(rows, dtype=torch.int32), torch.zeros(N, C)
    state = torch.tensor(state).reshape(-1, N)
    exit_layer = torch.zeros(N, dtype=torch.int64)
    inputs = (hidden, offsets, weight, bias, logits, aux)
    pooling = "none" if source == "logits" else source
    return *inputs, row_ids, state, answers, exit_layer, criterion, params, pooling, layer, depth


def compact_arguments(rows=4) -> tuple:
    row_ids = torch.arange(rows, dtype=torch.int32)
    row_ids[::2] = -1
    return row_ids, torch.arange(0, 2 * rows + 1, 2, dtype=torch.int32)


def gather_arguments(rows=3, grad=False) -> tuple:
    offsets = torch.arange(0, 2 * rows + 1, 2, dtype=torch.int32)
    source = torch.arange(rows, dtype=torch.int32)
    return torch.randn(2 * rows, H, requires_grad=grad), offsets, source, offsets.clone(), torch.zeros(2 * rows + 1, H)


def first_tokens_arguments(*, tokens=True, grad=False) -> tuple:
    """Positional arguments of first_tokens_linear: rows of 2, 0 and 1 tokens, or no tokens."""
    offsets = torch.tensor([0, 2, 2, 3] if tokens else [0] * 4, dtype=torch.int32)
    row_ids = torch.tensor([2, -1, -1] if tokens else [-1] * 3, dtype=torch.int32)
    hidden, weight, bias = (torch.randn(*shape, requires_grad=grad) for shape in ((8, H), (H, H), (H,)))
    return hidden, weight, bias, offsets, row_ids, torch.zeros(3, H), "tanh"


CASES = {
    "logits": ("exit_step", lambda: exit_step_arguments()),
    "logits_grad": ("exit_step", lambda: exit_step_arguments(grad=True)),
    "logits_empty": ("exit_step", lambda: exit_step_arguments(rows=0)),
    "first": ("exit_step", lambda: exit_step_arguments("first")),
    "mean": ("exit_step", lambda: exit_step_arguments("mean", layer=1)),
    "mean_grad": ("exit_step", lambda: exit_step_arguments("mean", grad=True)),
    "mean_empty": ("exit_step", lambda: exit_step_arguments("mean", rows=0)),
    "none": ("exit_step", lambda: exit_step_arguments("none", criterion="full_depth")),
    "aux": ("exit_step", lambda: exit_step_arguments(criterion="q_exit", layer=1)),
    "state_per_class": ("exit_step", lambda: exit_step_arguments(criterion="dact", layer=1)),
    "compact": ("compact", compact_arguments),
    "compact_empty": ("compact", lambda: compact_arguments(0)),
    "gather": ("gather_rows", gather_arguments),
    "gather_grad": ("gather_rows", lambda: gather_arguments(grad=True)),
    "gather_empty": ("gather_rows", lambda: gather_arguments(0)),
    "first_tokens": ("first_tokens_linear", first_tokens_arguments),
    "first_tokens_grad": ("first_tokens_linear", lambda: first_tokens_arguments(grad=True)),
    "first_tokens_empty": ("first_tokens_linear", lambda: first_tokens_arguments(tokens=False)),
}


def op_of(name, backend):
    return getattr(OPS, f"{name}_{backend}").default


def has(name, backend):
    return backend in schema._back_ends(name, "cpu")


def test_every_op_has_a_case():
    assert {name for name, _ in CASES.values()} == set(schema._OPS)


every_case = pytest.mark.parametrize(
    ("backend", "case"),
    [
        pytest.param(p.values[0], case, marks=p.marks)
        for case, (name, _) in CASES.items()
        for p in backend_params()
        if has(name, p.values[0])
    ],
)


@pytest.mark.sample(4)
@every_case
def test_opcheck(backend, case):
    name, arguments = CASES[case]
    torch.library.opcheck(op_of(name, backend), arguments())


@every_case
def test_mutates_only_declared_arguments(backend, case):
    name, arguments = CASES[case]
    op, given = op_of(name, backend), arguments()
    before = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in given]
    returned = op(*given)
    returned = returned if isinstance(returned, tuple) else (returned,)
    changed = {
        argument.name
        for argument, old, new in zip(op._schema.arguments, before, given, strict=True)
        if isinstance(new, torch.Tensor) and not torch.equal(old, new.detach())
    }
    declared = {a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    assert changed <= declared
    if case in ("logits", "first", "mean_grad", "gather", "first_tokens"):
        assert changed == declared
    memory = {x.untyped_storage().data_ptr() for x in given if isinstance(x, torch.Tensor) and x.numel()}
    assert all(x.untyped_storage().data_ptr() not in memory for x in returned if x is not None and x.numel())


def test_back_ends_share_one_schema():
    for name in {name for name, _ in CASES.values()}:
        back_ends = [backend for backend in BACKENDS if has(name, backend)]
        assert back_ends
        schemas = {str(op_of(name, backend)._schema).split("(", 1)[1] for backend in back_ends}
        assert len(schemas) == 1


def test_fake_tensors_have_the_real_shapes_and_dtypes(backend):
    from torch._subclasses.fake_tensor import FakeTensorMode

    for name, arguments in CASES.values():
        if not has(name, backend):
            continue
        real = op_of(name, backend)(*arguments())
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            given = [mode.from_tensor(x.detach()) if isinstance(x, torch.Tensor) else x for x in arguments()]
            fake = op_of(name, backend)(*given)
        real, fake = (x if isinstance(x, tuple) else (x,) for x in (real, fake))
        assert [describe(x) for x in real] == [describe(x) for x in fake]


def describe(tensor):
    return None if tensor is None else (tuple(tensor.shape), tensor.dtype, tensor.device.type)


def test_unknown_criterion_is_refused(backend):
    arguments = list(exit_step_arguments(criterion="full_depth"))
    arguments[10] = "nonsense"
    assert "nonsense" not in RULES
    with pytest.raises((ValueError, KeyError), match="nonsense"):
        op_of("exit_step", backend)(*arguments)
