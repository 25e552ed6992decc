"""Calls that the public ops accept or refuse: as their declarations say, and with the results of the oracle.

The calls are drawn from the declarations (`support.op_calls`): valid ones, some with one argument that no op takes in
its place, and some with any ids and offsets.
"""

from __future__ import annotations

import contextlib
import inspect
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import op_calls, oracle
from support.backends import backend_params
from support.exit_step_cases import NO_LAYER, UNTOUCHED
from support.op_calls import HIGHEST, LOWEST, in_one_buffer, int32, positional, tensors_of

from earlyexit_kernels import ops
from earlyexit_kernels.criteria import Entropy, Margin, Patience, QExit, Voting
from earlyexit_kernels.ops.schema import SHAPES, raw

PUBLIC = ("exit_step", "compact", "gather_rows")
on_each = pytest.mark.parametrize(
    ("backend", "op"), [pytest.param(p.values[0], op, marks=p.marks) for op in PUBLIC for p in backend_params()]
)


def check_result(op, before, after, returned) -> None:
    """Compare the results of a valid call with the oracle."""
    if op == "compact":
        expected = oracle.compact(before["row_ids"].tolist(), before["offsets"].tolist())
        assert [x.tolist() for x in returned] == list(expected)
    elif op == "gather_rows":
        out = before["out"].clone()
        indices = (before[name].tolist() for name in ("offsets", "source", "new_offsets"))
        oracle.gather_rows(before["hidden"], *indices, out)
        assert torch.equal(after["out"], out) and returned is None
    else:
        check_exit(before, after, returned)


def check_exit(before, after, counts) -> None:
    fused = "hidden" in before
    inputs = [before[name].double().numpy() for name in (("hidden", "weight", "bias") if fused else ("logits",))]
    names = ("row_ids", "state", "answers", "exit_layer")
    truth = {name: before[name].double().numpy().copy() for name in names}
    truth |= {name: truth[name].astype(np.int64) for name in ("row_ids", "exit_layer")}
    step = oracle.exit_step(
        decide=oracle.decide_q_exit,
        params=(0.5,),
        layer=1,
        depth=before["depth"],
        source=before["pooling"] if fused else "logits",
        inputs=tuple(inputs) if fused else inputs[0],
        offsets=before["offsets"].tolist() if "offsets" in before else None,
        aux=before["aux"].double().numpy(),
        **truth,
    )
    assert counts.tolist() == list(step.counts)
    for name in names:
        tolerance = 1e-5 if name in ("state", "answers") else 0
        np.testing.assert_allclose(after[name].numpy(), truth[name], rtol=tolerance, atol=tolerance)


def judge(op, arguments, backend, fits: bool) -> None:
    """Call a public op: a valid call gives the results of the oracle, and an invalid one raises and changes nothing."""
    before = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    call = getattr(ops, op)
    if fits:
        check_result(op, before, arguments, call(**arguments, backend=backend))
        return
    with pytest.raises((ValueError, TypeError), match=rf"^{op}: (expected .* got |\w+ is on )"):
        call(**arguments, backend=backend)
    for name, x in tensors_of(before).items():
        assert x.is_sparse or x.is_meta or torch.equal(arguments[name], x), f"a refused call changed {name}"


@on_each
@settings(max_examples=50)
@given(st.randoms(use_true_random=False))
def test_valid_calls_give_the_results_of_the_oracle(backend, op, r):
    judge(op, op_calls.drawn(op, r), backend, fits=True)


@on_each
@settings(max_examples=80)
@given(st.randoms(use_true_random=False))
def test_refuses_what_the_declaration_forbids(backend, op, r):
    arguments = op_calls.drawn(op, r)
    op_calls.broken(op, arguments, r)
    judge(op, arguments, backend, fits=False)


@on_each
def test_ids_and_offsets_are_taken_as_documented(backend, op):
    r, taken, calls = random.Random(0), 0, 250
    for _ in range(calls):
        arguments = op_calls.drawn(op, r)
        op_calls.with_any_values(op, arguments, r)
        fits = op_calls.values_fit(op, arguments)
        judge(op, arguments, backend, fits)
        taken += fits
    assert calls / 8 < taken < calls * 7 / 8


@pytest.mark.parametrize("op", SHAPES)
@pytest.mark.parametrize("backend", backend_params(["cpp"]))
def test_the_compiled_ops_check_what_would_crash_them(backend, op):
    """The raw ops may refuse or take a wrong call, but read and write their tensors alone."""
    r = random.Random(0)
    for _ in range(150):
        arguments = op_calls.drawn(op, r)
        op_calls.broken(op, arguments, r)
        with contextlib.suppress(ValueError, TypeError, RuntimeError):
            raw(op, backend, "cpu")(*positional(op, arguments))


#: Op -> a call of 2 rows, in which every tensor has at least 8 bytes.
CALLS = {
    "exit_step": lambda: {
        "criterion": QExit(q=0.5),
        "layer": 1,
        "depth": 2,
        "row_ids": int32([1, 0]),
        "state": torch.ones(1, 2),
        "answers": torch.full((2, 2), UNTOUCHED),
        "exit_layer": torch.full((2,), NO_LAYER),
        "offsets": int32([0, 1, 2]),
        "hidden": torch.ones(2, 3),
        "weight": torch.ones(2, 3),
        "bias": torch.ones(2),
        "aux": torch.ones(2),
        "pooling": "first",
    },
    "compact": lambda: {"row_ids": int32([1, 0]), "offsets": int32([0, 2, 4])},
    "gather_rows": lambda: {
        "hidden": torch.ones(4, 3),
        "offsets": int32([0, 2, 4]),
        "source": int32([0, 1]),
        "new_offsets": int32([0, 2, 4]),
        "out": torch.zeros(4, 3),
    },
}
LOGITS = {"hidden": None, "weight": None, "bias": None, "logits": torch.zeros(2, 2)}
#: Op -> pairs of changed arguments, and words of the message: what was expected, what was given, what to do. Each kind
#: of message once: that no op takes such arguments is tested above.
MESSAGES = {
    "compact": [
        ({"row_ids": int32([1, 0]).view(2, 1)}, r"expected row_ids of shape \[B\], got \[2, 1\]"),
        ({"offsets": int32([0, 1])}, r"expected offsets of shape \[3\], got \[2\]"),
        ({"offsets": int32([0, 1, 2]).to("meta")}, "offsets is on meta, the rest on cpu; use one device"),
        ({"row_ids": int32([1, 0]).to("meta")}, "expected row_ids with values, got a meta tensor; move it to a device"),
        ({"row_ids": [1, 0]}, "expected row_ids to be a tensor, got list"),
        ({"row_ids": int32([1, 0]).to_sparse()}, r"expected row_ids to be a dense tensor, got .*; call .to_dense\(\)"),
        (
            {"row_ids": int32([1, 0, 1]), "offsets": int32([0, 1, 2, 3])},
            "expected distinct row_ids, got 1 more than once; set the ids of rows that have left to -1",
        ),
        (
            {"offsets": int32([0, 3, 2])},
            "expected non-decreasing offsets .* minimum step of -1; pass cumulative lengths",
        ),
        ({"offsets": int32([0, HIGHEST, LOWEST])}, "expected non-decreasing offsets from 0 or above, got 0 to -2147"),
        (
            {"row_ids": int32([0]).expand(2**31), "offsets": int32([0]).expand(2**31 + 1)},
            "expected at most 2147483647 rows, got 2147483648; split the batch",
        ),
    ],
    "gather_rows": [
        ({"hidden": torch.zeros(4, 3).long()}, "expected hidden to be torch.float32 or .*, got torch.int64"),
        ({"out": torch.zeros(4, 3).half()}, "expected out to be torch.float32, got torch.float16"),
        ({"out": torch.zeros(3, 4).T}, r"expected out, which is written, to be contiguous, got strides \(1, 4\)"),
        ({"offsets": int32([])}, r"expected offsets of shape \[B \+ 1\], got \[0\]"),
        (
            {"offsets": int32([0, 2, 5])},
            "expected non-decreasing offsets from 0 or above to at most 4 tokens, got 0 to 5",
        ),
        ({"new_offsets": int32([0, 2, 5])}, "expected non-decreasing new_offsets .* to at most 4 tokens, got 0 to 5"),
        ({"source": int32([0, 2])}, "expected source below the 2 rows of offsets, got 2"),
        (
            {"new_offsets": int32([0, 2, 3])},
            "expected new_offsets to keep the 2 tokens of row 1, got 1; pass what compact",
        ),
    ],
    "exit_step": [
        ({**LOGITS, "hidden": torch.ones(2, 3)}, "expected either hidden .* or logits, got both or neither"),
        ({"hidden": None}, "expected either hidden .* or logits, got both or neither"),
        ({"weight": None}, r"expected weight \[C, H\] and bias \[C\] beside hidden, and neither beside logits"),
        ({**LOGITS, "bias": torch.ones(2)}, r"expected weight \[C, H\] and bias \[C\] beside hidden, and neither"),
        ({"pooling": "max"}, r"expected pooling to be one of \('first', 'mean', 'none'\), got 'max'"),
        ({"pooling": None}, "expected pooling .* got None"),
        ({"aux": None}, r"expected aux \[B\], the halting that criterion 'q_exit' reads, got None"),
        ({**LOGITS, "logits": torch.zeros(2, 3)}, r"expected logits of shape \[2, 2\], got \[2, 3\]"),
        ({"hidden": torch.ones(3, 3), "pooling": "none"}, r"expected hidden of shape \[2, 3\], got \[3, 3\]"),
        ({"hidden": torch.ones(3, 3), "offsets": None}, r"expected hidden of shape \[2, 3\], got \[3, 3\]"),
        ({"hidden": torch.ones(2, 0), "weight": torch.ones(2, 0)}, r"expected hidden of width >= 1, got \[2, 0\]"),
        ({"bias": torch.ones(2).half()}, "expected bias to be torch.float32, got torch.float16"),
        ({"criterion": Voting(threshold=1)}, r"expected state of shape \[2, 2\], got \[1, 2\]"),
        (
            {"criterion": Patience(patience=1), "state": torch.ones(2, 5)},
            r"expected state of shape \[2, 2\], got \[2, 5\]",
        ),
        ({"row_ids": None}, "expected row_ids to be a tensor, got NoneType"),
        ({"answers": torch.zeros(2, 0)}, r"expected answers \[N, C\] with at least one class, got \[2, 0\]"),
        (
            {"answers": torch.zeros(2, 1), "criterion": Margin(threshold=0.5)},
            r"expected answers \[N, C\] with at least 2 classes, which the criterion compares, got \[2, 1\]",
        ),
        ({"layer": 0}, "expected 1 <= layer <= depth, got layer 0 of 2; layers count from 1"),
        ({"layer": 3}, "expected 1 <= layer <= depth, got layer 3 of 2"),
        ({"layer": -3, "criterion": Entropy(threshold=[0.5])}, "expected 1 <= layer <= depth, got layer -3"),
        ({"layer": 1.0}, "expected layer to be a whole number, got 1.0"),
        ({"layer": True}, "expected layer to be a whole number, got True"),
        ({"depth": 2**31}, "expected depth to be at most 2147483647 in magnitude, got 2147483648"),
        ({"criterion": "entropy"}, "expected an instance of a criterion, .* got 'entropy'"),
        ({"row_ids": int32([0, 2])}, "expected row_ids below the 2 rows of answers, got 2"),
        (
            {"offsets": int32([0, 1, 3])},
            "expected non-decreasing offsets from 0 or above to at most 2 tokens, got 0 to 3",
        ),
        (
            {"offsets": int32([0, 2, 2])},
            "expected at least one token in every present row, got an empty row; set its row",
        ),
        ({**LOGITS, "offsets": int32([0, 2, 1])}, "expected non-decreasing offsets from 0 or above, got 0 to 1"),
        ({**LOGITS, "offsets": int32([-1, 1, 2])}, "expected non-decreasing offsets from 0 or above, got -1 to 2"),
    ],
}


@pytest.mark.parametrize(
    ("op", "changed", "words"), [(op, *case) for op, cases in MESSAGES.items() for case in cases], ids=str
)
def test_a_refusal_says_what_was_expected_and_what_came(op, changed, words):
    arguments = {name: x for name, x in {**CALLS[op](), **changed}.items() if x is not None or name in changed}
    error = TypeError if "to be a tensor" in words or "whole number" in words or "instance of" in words else ValueError
    with pytest.raises(error, match=f"^{op}: {words}"):
        getattr(ops, op)(**arguments, backend="torch")


def pairs(op) -> list[tuple[str, str]]:
    """A written tensor of a call of `CALLS`, and another one."""
    names = list(tensors_of(CALLS[op]()))
    return [(w, other) for w in names if SHAPES[op].arguments[w].written for other in names if other != w]


@on_each
def test_overlapping_memory_is_refused(backend, op):
    for first, second in pairs(op):
        # no tensor is smaller than 8 bytes, and 8 is a multiple of the size of every dtype
        arguments = CALLS[op]()
        arguments[first], arguments[second] = in_one_buffer(arguments[first], arguments[second], 8)
        with pytest.raises(ValueError, match=rf"^{op}: expected \w+ to share no memory with \w+; pass a second buffer"):
            getattr(ops, op)(**arguments, backend=backend)
        apart = CALLS[op]()
        gap = -apart[first].numel() * apart[first].element_size() % 8
        apart[first], apart[second] = in_one_buffer(apart[first], apart[second], -gap)
        getattr(ops, op)(**apart, backend=backend)


@pytest.mark.parametrize("backend", backend_params(["cpp"]))
def test_the_compiled_exit_refuses_overlapping_memory_itself(backend):
    """A row id overwritten by an answer would index any memory."""
    for first, second in pairs("exit_step"):
        arguments = CALLS["exit_step"]()
        arguments[first], arguments[second] = in_one_buffer(arguments[first], arguments[second], 8)
        with pytest.raises(
            ValueError, match=r"^exit_step_cpp: expected \w+ to share no memory with \w+; pass a second"
        ):
            raw("exit_step", backend, "cpu")(*positional("exit_step", arguments))


@pytest.mark.parametrize("backend", backend_params(["cpp"]))
@pytest.mark.parametrize(
    ("op", "changed", "words"),
    [
        ("exit_step", {"row_ids": int32([0, 2])}, "expected row_ids below the 2 rows"),
        ("exit_step", LOGITS | {"row_ids": int32([0, 2])}, "expected row_ids below the 2 rows"),
        ("gather_rows", {"new_offsets": int32([0, 1, 2])}, "expected new_offsets to keep the 2 tokens of row 0"),
        ("gather_rows", {"new_offsets": int32([0, 3, 4])}, "expected new_offsets to keep the 2 tokens of row 0"),
    ],
    ids=str,
)
def test_the_compiled_ops_refuse_themselves_what_would_leave_their_memory(op, changed, words, backend):
    arguments = {name: x for name, x in {**CALLS[op](), **changed}.items() if x is not None}
    with pytest.raises(ValueError, match=f"^{op}_cpp: {words}"):
        raw(op, backend, "cpu")(*positional(op, arguments))


@pytest.mark.parametrize("left", [False, True])
def test_offsets_at_the_limit_of_int32(backend, left):
    """The tokens of a row are counted without overflow."""
    ids, ends = [-1 if left else 0, 1], [1, HIGHEST, HIGHEST]
    planned = ops.compact(int32(ids), int32(ends), backend=backend)
    assert [x.tolist() for x in planned] == list(oracle.compact(ids, ends))
    arguments = CALLS["exit_step"]() | LOGITS | {"row_ids": int32(ids), "offsets": int32(ends), "aux": torch.zeros(2)}
    counts = ops.exit_step(**arguments, backend=backend)
    assert counts.tolist() == ([1, 0, 0] if left else [2, HIGHEST - 1, 0])


def test_strided_inputs_are_read_as_they_are(backend):
    for op in PUBLIC:
        dense, strided = (op_calls.drawn(op, random.Random(3), rows=4, pooling="mean", has_offsets=True) for _ in "ab")
        for name, x in tensors_of(strided).items():
            if not SHAPES[op].arguments[name].written and x.dim() > 0:
                strided[name] = torch.stack([x, x * 0 - 7], dim=-1)[..., 0]
        returned = [getattr(ops, op)(**given, backend=backend) for given in (dense, strided)]
        as_lists = [
            x and [t.tolist() for t in x] if op == "compact" else x is not None and x.tolist() for x in returned
        ]
        assert as_lists[0] == as_lists[1]
        assert all(torch.equal(strided[name], x) for name, x in tensors_of(dense).items())


DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "extending_ops.md"


def test_documents_show_the_declarations():
    """The table of the page, and the docstrings."""
    rows = []
    for op in sorted(PUBLIC):
        docstring = inspect.getdoc(getattr(ops, op))
        for name, argument in SHAPES[op].arguments.items():
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in argument.dtypes)
            dtypes = f"that of `{argument.dtypes}`" if isinstance(argument.dtypes, str) else names
            role = "written" if argument.written else "optional" if argument.optional else "read"
            rows.append(f"| `{op}` | `{name}` | `[{argument.shape}]` | {dtypes} | {role} |")
            assert f"``[{argument.shape}]``" in docstring, f"{op}: {name}"
    assert [line for line in DOCUMENT.read_text().splitlines() if re.match(r"\| `\w+` \| `\w+` \| `\[", line)] == rows


def test_declarations_name_the_arguments_of_the_functions():
    for op in PUBLIC:
        assert set(SHAPES[op].arguments) < set(inspect.signature(getattr(ops, op)).parameters)
