"""torch.library.opcheck on every op and back-end, and the declared mutations."""

from __future__ import annotations

import functools

import pytest
import torch
from support.backends import backend_params

from earlyexit_kernels import ops
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


def encoder_arguments(op, *, tokens=True, grad=False) -> tuple:
    """Positional arguments of an op of an encoder layer: rows of 2, 0 and 1 tokens, or no tokens."""
    offsets = torch.tensor([4, 6, 6, 7] if tokens else [0] * 4, dtype=torch.int32)
    row_ids = torch.tensor([2, -1, -1] if tokens else [-1] * 3, dtype=torch.int32)
    x, hidden, qkv, out = (torch.randn(*shape, requires_grad=grad) for shape in ((4, H), (8, H), (4, 3 * H), (4, H)))
    weight, bias = torch.randn(H, H, requires_grad=grad), torch.randn(H, requires_grad=grad)
    starts, total = torch.tensor([0, 0, 1], dtype=torch.int32), torch.zeros(8, H)
    return {
        "rows_linear": (hidden, [weight], [bias], offsets, out.detach(), "gelu", True, False),
        "first_tokens_linear": (hidden, weight, bias, offsets, row_ids, torch.zeros(3, H), "tanh"),
        "rows_attention": (qkv, offsets, row_ids, 2, 2, out.detach(), 1, torch.arange(4), starts),
        "rows_rotary": (qkv.detach(), x[:, : H // 2], x[:, H // 2 :], starts, offsets, row_ids, 2, 2),
        "rows_mean": (hidden, offsets, row_ids, torch.zeros(3, H)),
        "rows_glu": (hidden.view(4, -1), offsets, out.detach(), "gelu"),
        "rows_embed": (torch.ones(4, 4).long(), hidden, weight, x, bias, bias.detach(), 1e-5, offsets, out.detach()),
        "rows_add_norm": (
            x,
            None,
            hidden,
            bias,
            bias.detach().clone(),
            1e-5,
            offsets,
            out.detach(),
            True,
            False,
            total,
        ),
    }[op]


def pack_arguments() -> tuple:
    batch = torch.tensor([2, 3, 1, 1, 1], dtype=torch.int32)
    ids, mask, positions, types = torch.randint(1, 9, (4, 3, 4))
    found, row_ids, offsets, counts = (torch.full(s, 9, dtype=torch.int32) for s in ((2, 3), (3,), (4,), (4,)))
    tokens, states = torch.full((4, 12), 9), (torch.tensor([1.0, 2.0]), torch.zeros(2, 3))
    return batch, ids, mask, positions, types, found, row_ids, offsets, tokens, counts, *states


def resident_arguments(source="logits") -> tuple:
    """Positional arguments of resident_exit; at the last layer every row leaves, so that all mutable tensors change."""
    inputs = exit_step_arguments(source)
    hidden, offsets, weight, bias, logits, aux, row_ids, *written_and_rule = inputs
    rows, tokens = row_ids.numel(), 2 * row_ids.numel()
    if hidden is not None:
        hidden = torch.cat((hidden, torch.zeros_like(hidden)))
    offsets = torch.arange(0, tokens + 1, 2, dtype=torch.int32)
    planned = (torch.full((size,), 9, dtype=torch.int32) for size in (rows + 1, rows, 6))
    return hidden, weight, bias, logits, aux, row_ids, offsets, *planned, *written_and_rule, 1, tokens, None


def layer_arguments(buckets=1) -> tuple:
    """Positional arguments of encoder_layer, without gradients: 4 tokens in one bucket, or rows of 3 and 1 in two."""
    shapes = ((3 * H, H), (3 * H,), (H, H), (H,), (H,), (H,), (2 * H, H), (2 * H,), (H, 2 * H), (H,), (H,), (H,))
    x, *weights = (torch.randn(*shape) for shape in ((4, H), *shapes))
    call = (x, weights, [], [1e-5, 1e-5], 2, "gelu", "none", False)
    if buckets == 1:
        return *call, [2], [2], [None], [None], [None], None
    filled = torch.tensor([True, True, True, False]).view(1, 1, 1, 4)
    slots, kept = [torch.tensor([0, 1, 2, 2]), torch.tensor([3])], [torch.arange(3), None]
    return *call, [1, 1], [4, 1], slots, [filled, None], kept, torch.arange(4)


def packed_layer_arguments(*, tokens=True) -> tuple:
    """Positional arguments of packed_layer: rows of 3, 0 and 1 tokens, or none."""
    offsets = torch.tensor([0, 3, 3, 4] if tokens else [0], dtype=torch.int32)
    packed = ops.pack_weights(ops.EncoderWeights(*layer_arguments()[1]))
    return torch.randn(4 if tokens else 0, H), offsets, *packed, [1e-5, 1e-5], 2, "gelu"


ENCODER_OPS = (
    "rows_linear",
    "first_tokens_linear",
    "rows_attention",
    "rows_add_norm",
    "rows_rotary",
    "rows_mean",
    "rows_glu",
    "rows_embed",
)
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
    "pack": ("pack_tokens", pack_arguments),
    "resident": ("resident_exit", resident_arguments),
    "resident_first": ("resident_exit", lambda: resident_arguments("first")),
    "layer": ("encoder_layer", layer_arguments),
    "packed_layer": ("packed_layer", packed_layer_arguments),
    "packed_layer_empty": ("packed_layer", lambda: packed_layer_arguments(tokens=False)),
    "layer_buckets": ("encoder_layer", lambda: layer_arguments(2)),
    "attention_without_a_window": ("rows_attention", lambda: (*encoder_arguments("rows_attention")[:6], *[None] * 3)),
    "words_alone": (
        "rows_embed",
        lambda: (*encoder_arguments("rows_embed")[:2], None, None, *encoder_arguments("rows_embed")[4:]),
    ),
    "norm_alone": ("rows_add_norm", lambda: (None, None, *encoder_arguments("rows_add_norm")[2:-1], None)),
    **{op: (op, functools.partial(encoder_arguments, op)) for op in ENCODER_OPS},
    **{f"{op}_grad": (op, functools.partial(encoder_arguments, op, grad=True)) for op in ENCODER_OPS},
    **{f"{op}_empty": (op, functools.partial(encoder_arguments, op, tokens=False)) for op in ENCODER_OPS},
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
    if case in ("logits", "first", "mean_grad", "gather", "pack", "resident", "resident_first", *ENCODER_OPS):
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
