"""The arguments of exit_step: layouts, optional inputs, gradients, rows that have left, and error messages."""

from __future__ import annotations

import pytest
import torch
from support.exit_step_cases import NO_LAYER, UNTOUCHED, memory

from earlyexit_kernels.criteria import Dact, Entropy, FullDepth, MaxProbability, Patience, QExit, SkipGate, Voting
from earlyexit_kernels.ops import compact, exit_step, gather_rows

B, C, H = 4, 3, 8


def call(criterion=None, *, requests=B, classes=C, **changed) -> dict:
    """Keyword arguments of a valid call with logits at layer 1 of 2, with some changed."""
    criterion = criterion or MaxProbability(threshold=0.0)
    arguments = dict(
        criterion=criterion,
        layer=1,
        depth=2,
        row_ids=torch.arange(B, dtype=torch.int32),
        logits=torch.randn(B, classes),
        **memory(criterion, requests, classes),
    )
    return {name: value for name, value in {**arguments, **changed}.items() if value is not None}


def head(dtype=torch.float32, tokens=B, classes=C) -> dict:
    """Hidden states and a linear head instead of logits."""
    hidden, weight, bias = torch.randn(tokens, H), torch.randn(classes, H), torch.randn(classes)
    return {"logits": None, "hidden": hidden.to(dtype), "weight": weight.to(dtype), "bias": bias.to(dtype)}


#: Case -> the call, and words of the message: the argument, what was expected, what was given.
REFUSED = {
    "both": (lambda: call(hidden=torch.randn(B, H)), ("either hidden", "or logits", "got both or neither")),
    "neither": (lambda: call(logits=None), ("either hidden", "or logits", "got both or neither")),
    "no_weight": (lambda: call(**{**head(), "weight": None}), ("weight [C, H] and bias [C]", "hidden")),
    "pooling": (lambda: call(pooling="max"), ("pooling", "('first', 'mean', 'none')", "got 'max'")),
    "no_aux": (lambda: call(QExit(q=0.5)), ("aux [B]", "halting", "'q_exit'", "got None")),
    "aux": (lambda: call(QExit(q=0.5), aux=torch.rand(B + 1)), ("aux", "[4]", "got [5]")),
    "aux_dtype": (lambda: call(QExit(q=0.5), aux=torch.rand(B).half()), ("aux", "float32", "got torch.float16")),
    "logits": (lambda: call(logits=torch.randn(B, C + 1)), ("logits", "[4, 3]", "got [4, 4]")),
    "hidden": (lambda: call(**{**head(), "hidden": torch.randn(B + 1, H)}), ("hidden", "[4, 8]", "got [5, 8]")),
    "no_width": (
        lambda: call(**{**head(), "hidden": torch.randn(B, 0), "weight": torch.randn(C, 0)}),
        ("hidden", "width >= 1", "got [4, 0]"),
    ),
    "weight": (lambda: call(**{**head(), "weight": torch.randn(C, H + 1)}), ("weight", "[3, 8]", "got [3, 9]")),
    "bias": (lambda: call(**{**head(), "bias": torch.randn(C + 1)}), ("bias", "[3]", "got [4]")),
    "offsets": (lambda: call(offsets=torch.zeros(B, dtype=torch.int32)), ("offsets", "[5]", "got [4]")),
    "offsets_dtype": (lambda: call(offsets=torch.arange(B + 1)), ("offsets", "torch.int32", "got torch.int64")),
    "exit_layer": (lambda: call(exit_layer=torch.zeros(9, dtype=torch.int64)), ("exit_layer", "[4]", "got [9]")),
    "exit_layer_dtype": (lambda: call(exit_layer=torch.zeros(B).int()), ("exit_layer", "torch.int64", "torch.int32")),
    "state_rows": (lambda: call(Patience(patience=1), state=torch.zeros(2, 5)), ("state", "[2, 4]", "got [2, 5]")),
    "state_width": (lambda: call(Patience(patience=1), state=torch.zeros(1, B)), ("state", "[2, 4]", "got [1, 4]")),
    "state_classes": (lambda: call(Voting(threshold=1), state=torch.zeros(2, B)), ("state", "[3, 4]", "got [2, 4]")),
    "two_dtypes": (
        lambda: call(**{**head(torch.float16), "bias": torch.randn(C)}),
        ("bias", "torch.float16", "got torch.float32"),
    ),
    "float64_logits": (lambda: call(logits=torch.randn(B, C).double()), ("logits", "torch.float32", "torch.float64")),
    "integer_logits": (lambda: call(logits=torch.zeros(B, C).long()), ("logits", "torch.float32", "got torch.int64")),
    "float64_hidden": (lambda: call(**head(torch.float64)), ("hidden", "torch.float32", "got torch.float64")),
    "row_ids_dtype": (lambda: call(row_ids=torch.arange(B)), ("row_ids", "torch.int32", "got torch.int64")),
    "answers_dtype": (lambda: call(answers=torch.zeros(B, C).half()), ("answers", "torch.float32", "torch.float16")),
    "answers_strided": (lambda: call(answers=torch.zeros(C, B).T), ("answers", "contiguous", "strides (1, 4)")),
    "row_ids_strided": (lambda: call(row_ids=torch.zeros(8).int()[::2]), ("row_ids", "contiguous", "strides (2,)")),
    "two_devices": (lambda: call(logits=torch.randn(B, C, device="meta")), ("logits", "meta", "cpu", "one device")),
    "layer_0": (lambda: call(layer=0), ("layer", " 0 ")),
    "layer_beyond": (lambda: call(layer=3), ("layer", " 3 ", "2")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_invalid_arguments_are_refused(backend, name):
    build, words = REFUSED[name]
    arguments = build()
    before = {k: v.clone() for k, v in arguments.items() if isinstance(v, torch.Tensor) and v.device.type == "cpu"}
    with pytest.raises(ValueError) as caught:
        exit_step(**arguments, backend=backend)
    message = str(caught.value)
    assert message.startswith("exit_step") and all(word in message for word in words), message
    assert all(torch.equal(arguments[k], v) for k, v in before.items()), "a refused call must change nothing"


@pytest.mark.parametrize("offsets", [[0, 2, 1, 3, 4], [-1, 1, 2, 3, 4]], ids=["decrease", "below_0"])
def test_message_for_invalid_offsets_beside_logits(backend, offsets):
    with pytest.raises(
        ValueError, match=r"exit_step.*: expected non-decreasing offsets .*; pass cumulative lengths"
    ) as caught:
        exit_step(**call(offsets=torch.tensor(offsets, dtype=torch.int32)), backend=backend)
    assert "None" not in str(caught.value)


def test_default_offsets_are_one_token_per_row(backend):
    arguments = [
        call(FullDepth(), **head(), depth=depth, pooling=p) for p in ("first", "mean", "none") for depth in (1, 2)
    ]
    for given in arguments:
        z = given["hidden"] @ given["weight"].T + given["bias"]
        counts = exit_step(**given, backend=backend)
        assert counts.tolist() == ([0, 0, 0] if given["depth"] == 1 else [B, B, 0])
        if given["depth"] == 1:
            torch.testing.assert_close(given["answers"], z, rtol=1e-5, atol=1e-5)


def test_strided_inputs(backend):
    dense = call(**head(tokens=2 * B), offsets=torch.arange(0, 2 * B + 1, 2, dtype=torch.int32), pooling="mean")
    strided = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in dense.items()}
    for name in ("hidden", "weight", "bias"):
        strided[name] = torch.stack([strided[name]] * 2, dim=-1)[..., 0]
        assert not strided[name].is_contiguous()
    exit_step(**dense, backend=backend)
    exit_step(**strided, backend=backend)
    assert torch.equal(dense["answers"], strided["answers"])
    assert not (dense["answers"] == UNTOUCHED).any()


def test_tokens_beyond_the_last_offset_are_not_read(backend):
    given = call(**head(tokens=7), offsets=torch.tensor([1, 2, 3, 3, 5], dtype=torch.int32), pooling="mean")
    given["row_ids"][2] = -1
    given["hidden"][[0, 5, 6]] = torch.nan
    tokens = given["hidden"]
    counts = exit_step(**given, backend=backend)
    z = torch.stack([tokens[1], tokens[2], tokens[3:5].mean(0)]) @ given["weight"].T + given["bias"]
    assert counts.tolist() == [0, 0, 0]
    torch.testing.assert_close(given["answers"][[0, 1, 3]], z, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_step_after_compaction(backend, pooling):
    """`compact` leaves empty rows at the end."""
    offsets = torch.tensor([0, 2, 3, 5, 6], dtype=torch.int32)
    row_ids = torch.tensor([3, -1, 1, -1], dtype=torch.int32)
    given = call(**head(tokens=6), depth=1, pooling=pooling)
    new_ids, new_offsets, source = compact(row_ids, offsets, backend=backend)
    moved = torch.full((4, H), torch.nan)
    gather_rows(given["hidden"], offsets, source, new_offsets, moved, backend=backend)
    plain = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    given.update(row_ids=new_ids, offsets=new_offsets, hidden=moved)
    plain.update(row_ids=row_ids, offsets=offsets)
    assert exit_step(**given, backend=backend).tolist() == exit_step(**plain, backend=backend).tolist() == [0, 0, 0]
    assert torch.equal(given["answers"], plain["answers"])
    assert (given["answers"] == UNTOUCHED).all(dim=1).tolist() == [True, False, True, False]


def test_rows_that_have_left_do_not_change(backend):
    """Their values are ignored, and they are not counted."""
    given = call(Patience(patience=1), row_ids=torch.tensor([-1, 2, -1, 0], dtype=torch.int32))
    given["logits"][[0, 2]] = torch.nan
    counts = exit_step(**given, backend=backend)
    assert counts.tolist() == [2, 2, 0]
    assert given["row_ids"].tolist() == [-1, 2, -1, 0]
    assert given["state"][0].isnan().tolist() == [False, True, False, True]
    assert (given["answers"] == UNTOUCHED).all()
    assert (given["exit_layer"] == NO_LAYER).all()


def test_invalid_row_keeps_its_state_and_leaves_at_the_last_layer(backend):
    given = call(Patience(patience=1), depth=3)
    first = given["logits"].clone()
    exit_step(**given, backend=backend)
    state = given["state"].clone()
    given["logits"] = first.clone()
    given["logits"][1, 2] = torch.nan
    assert exit_step(**{**given, "layer": 2}, backend=backend).tolist() == [1, 1, 1]
    assert torch.equal(given["state"][:, 1], state[:, 1])
    assert exit_step(**{**given, "layer": 3}, backend=backend).tolist() == [0, 0, 1]
    assert given["exit_layer"].tolist() == [2, 3, 2, 2]
    torch.testing.assert_close(given["answers"], given["logits"], rtol=0, atol=0, equal_nan=True)


def test_unneeded_aux_is_not_read(backend):
    given = call(Entropy(threshold=9.0), aux=torch.full((B,), torch.nan))
    assert exit_step(**given, backend=backend).tolist() == [0, 0, 0]


@pytest.mark.parametrize("criterion", [Voting(threshold=2), Dact()], ids=str)
def test_invalid_row_keeps_the_state_of_every_class(backend, criterion):
    given = call(criterion, depth=3, aux=torch.rand(B))
    exit_step(**given, backend=backend)
    state = given["state"].clone()
    given["logits"][1, 0] = torch.nan
    given["row_ids"][2] = -1
    exit_step(**{**given, "layer": 2}, backend=backend)
    assert torch.equal(given["state"][:, 1:3], state[:, 1:3])
    assert (given["state"][:, [0, 3]] != state[:, [0, 3]]).any(dim=0).all()


def test_skip_gate_decides_by_its_exit_rule(backend):
    gate, alone = call(SkipGate(threshold=0.5, exit=Entropy(threshold=0.9))), call(Entropy(threshold=0.9))
    alone["logits"] = gate["logits"]
    assert torch.equal(exit_step(**gate, backend=backend), exit_step(**alone, backend=backend))
    assert torch.equal(gate["row_ids"], alone["row_ids"])


def test_outputs_have_no_gradient(backend):
    """The outputs do not join the autograd graph of the inputs."""
    given = call(QExit(q=0.2), **head(), aux=torch.rand(B, requires_grad=True), depth=1, pooling="none")
    for name in ("hidden", "weight", "bias"):
        given[name].requires_grad_()
    counts = exit_step(**given, backend=backend)
    assert not any(given[name].requires_grad for name in ("answers", "state")) and not counts.requires_grad


def test_compiled_caller(backend):
    given = call(Entropy(threshold=0.9), row_ids=torch.tensor([2, -1, 0, 3], dtype=torch.int32))
    again = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    compiled = torch.compile(lambda arguments: exit_step(**arguments, backend=backend) + 0, backend="aot_eager")
    assert torch.equal(compiled(again), exit_step(**given, backend=backend))
    for name in ("row_ids", "answers", "exit_layer"):
        assert torch.equal(given[name], again[name])
    assert 0 < int((given["row_ids"] >= 0).sum()) < 3, "some of the rows should leave"
