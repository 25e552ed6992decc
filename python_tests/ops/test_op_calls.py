"""Calls that the public ops accept or refuse: on every back-end as a predicate says, with the results of the oracle.

The arguments are drawn at random, valid and invalid ones. The predicate and the oracle share no code with the package.
"""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from support import oracle
from support.backends import backend_params
from support.exit_step_cases import NO_LAYER, UNTOUCHED

from earlyexit_kernels import criteria, ops
from earlyexit_kernels.ops import compact, exit_step, gather_rows

LOWEST, HIGHEST = -(2**31), 2**31 - 1
CALLS, H, C = 250, 3, 2


def int32(values) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.int32)


def drawn_offsets(r: random.Random, rows: int) -> list[int]:
    """Offsets of a few rows, most of them valid; some start above 0, decrease, are negative or wrap in int32."""
    ends = list(itertools.accumulate((r.choice((0, 1, 1, 2, 3)) for _ in range(rows)), initial=r.choice((0, 0, 0, 2))))
    if r.random() < 0.5:
        for _ in range(r.choice((1, 1, 2))):
            ends[r.randrange(len(ends))] = r.choice((-1, 0, 1, 4, 9, LOWEST, HIGHEST, HIGHEST - 1))
    return ends


def drawn_ids(r: random.Random, rows: int, requests: int) -> list[int]:
    """Mostly distinct ids and rows that have left; some ids are out of range or repeated."""
    ids = (
        r.sample(range(max(rows, requests)), rows) if r.random() < 0.8 else [r.randrange(requests) for _ in range(rows)]
    )
    return [r.choice((-1, -1, -7, LOWEST)) if r.random() < 0.3 else n for n in ids]


def rising(ends, tokens=HIGHEST) -> bool:
    return ends[0] >= 0 and all(a <= b for a, b in itertools.pairwise(ends)) and ends[-1] <= tokens


def distinct(ids) -> bool:
    present = [n for n in ids if n >= 0]
    return len(set(present)) == len(present)


def verdict(op, fits: bool, arguments: dict, backend: str) -> bool:
    """Call `op` and return whether it ran; invalid calls must raise and change nothing."""
    if fits:
        arguments["returned"] = op(**arguments, backend=backend)
        return True
    before = {k: v.clone() for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    with pytest.raises(ValueError, match=rf"^{op.__name__}: expected .* got "):
        op(**arguments, backend=backend)
    assert all(torch.equal(arguments[k], v) for k, v in before.items())
    return False


def test_compact(backend):
    r, taken = random.Random(0), 0
    for _ in range(CALLS):
        rows = r.randrange(5)
        ids, ends = drawn_ids(r, rows, 6), drawn_offsets(r, rows)
        arguments = {"row_ids": int32(ids), "offsets": int32(ends)}
        if verdict(compact, distinct(ids) and rising(ends), arguments, backend):
            assert [x.tolist() for x in arguments["returned"]] == list(oracle.compact(ids, ends))
            taken += 1
    assert CALLS / 4 < taken < CALLS * 3 / 4


def test_gather_rows(backend):
    r, taken = random.Random(0), 0
    for _ in range(CALLS):
        rows, tokens, room = r.randrange(5), r.randrange(12), r.randrange(12)
        ends = drawn_offsets(r, rows) if r.random() < 0.5 else list(range(rows + 1))
        _, new_ends, source = oracle.compact(drawn_ids(r, rows, rows + 1), ends)
        if r.random() < 0.4:
            new_ends = drawn_offsets(r, rows)
        source = [r.choice((n, n, n, n, n, n, rows, HIGHEST, -3)) for n in source]
        new_ends = [min(max(end, LOWEST), HIGHEST) for end in new_ends]
        hidden, out = torch.randn(tokens, H), torch.full((room, H), UNTOUCHED)
        fits = rising(ends, tokens) and rising(new_ends, room) and all(n < rows for n in source)
        fits = fits and all(
            new_ends[j + 1] - new_ends[j] == ends[n + 1] - ends[n] for j, n in enumerate(source) if n >= 0
        )
        arguments = {
            "hidden": hidden,
            "offsets": int32(ends),
            "source": int32(source),
            "new_offsets": int32(new_ends),
            "out": out.clone(),
        }
        if verdict(gather_rows, fits, arguments, backend):
            oracle.gather_rows(hidden, ends, source, new_ends, out)
            assert torch.equal(arguments["out"], out)
            taken += 1
    assert CALLS / 8 < taken < CALLS * 3 / 4


def exit_arguments(pooling: str | None, ids, ends, tokens: int, requests: int, **changed) -> dict:
    """A call at the last layer, where every row leaves; without pooling on logits."""
    given = {"logits": torch.randn(len(ids), C)}
    if pooling:
        given = {"hidden": torch.randn(tokens, H), "weight": torch.randn(C, H), "bias": torch.randn(C)}
        given["pooling"] = pooling
    return {
        "criterion": criteria.FullDepth(),
        "layer": 1,
        "depth": 1,
        "row_ids": int32(ids),
        "state": torch.zeros(0, requests),
        "answers": torch.full((requests, C), UNTOUCHED),
        "exit_layer": torch.full((requests,), NO_LAYER),
        "offsets": None if ends is None else int32(ends),
        **given,
        **changed,
    }


def test_exit_step(backend):
    r, taken = random.Random(0), 0
    for _ in range(CALLS):
        rows, requests = r.randrange(5), r.randrange(3, 6)
        pooling = r.choice((None, "first", "mean", "none"))
        ids, ends = drawn_ids(r, rows, requests), r.choice((None, drawn_offsets(r, rows), drawn_offsets(r, rows)))
        pools = pooling in ("first", "mean") and ends is not None
        tokens = r.randrange(3, 12) if pools else rows
        fits = distinct(ids) and all(n < requests for n in ids)
        fits = fits and (ends is None or rising(ends, tokens if pools else HIGHEST))
        fits = fits and not (pools and any(ends[i] == ends[i + 1] for i, n in enumerate(ids) if n >= 0))
        arguments = exit_arguments(pooling, ids, ends, tokens, requests)
        if verdict(exit_step, fits, arguments, backend):
            check_against_oracle(arguments, ids, ends, pooling)
            taken += 1
    assert CALLS / 4 < taken < CALLS * 3 / 4


def check_against_oracle(arguments, ids, ends, pooling) -> None:
    names = ("hidden", "weight", "bias") if pooling else ("logits",)
    inputs = tuple(arguments[name].double().numpy() for name in names)
    requests = arguments["answers"].shape[0]
    answers, exit_layer = np.full((requests, C), UNTOUCHED), np.full(requests, NO_LAYER)
    row_ids = np.array(ids, dtype=np.int64)
    step = oracle.exit_step(
        decide=oracle.decide_full_depth,
        params=(),
        layer=1,
        depth=1,
        row_ids=row_ids,
        state=np.zeros((0, requests)),
        answers=answers,
        exit_layer=exit_layer,
        source=pooling or "logits",
        inputs=inputs if pooling else inputs[0],
        offsets=ends,
    )
    assert arguments["returned"].tolist() == list(step.counts)
    assert arguments["row_ids"].tolist() == row_ids.tolist()
    assert arguments["exit_layer"].tolist() == exit_layer.tolist()
    np.testing.assert_allclose(arguments["answers"].numpy(), answers, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("left", [False, True])
def test_offsets_at_the_limit_of_int32(backend, left):
    """The tokens of a row are counted without overflow."""
    ids, ends = [-1 if left else 0, 1], [1, HIGHEST, HIGHEST]
    planned = compact(int32(ids), int32(ends), backend=backend)
    assert [x.tolist() for x in planned] == list(oracle.compact(ids, ends))
    arguments = exit_arguments(None, ids, ends, 2, 2, depth=2)
    assert exit_step(**arguments, backend=backend).tolist() == ([1, 0, 0] if left else [2, HIGHEST - 1, 0])


def test_more_rows_than_int32_are_refused(backend):
    many = int32([0]).expand(2**31)
    with pytest.raises(ValueError, match=r"compact: expected at most 2147483647 rows, got 2147483648; split"):
        compact(many, int32([0]).expand(2**31 + 1), backend=backend)


#: Op -> function that returns the arguments of a valid call, and the names of those that the op writes.
OVERLAPS = {
    "exit_step": (
        lambda: (
            exit_arguments("first", [1, 0], [0, 1, 2], 2, 2, criterion=criteria.QExit(q=0.5))
            | {"state": torch.ones(1, 2), "aux": torch.zeros(2)}
        ),
        ("row_ids", "state", "answers", "exit_layer"),
    ),
    "gather_rows": (
        lambda: {
            "hidden": torch.zeros(4, H),
            "offsets": int32([0, 2, 4]),
            "source": int32([0, 1]),
            "new_offsets": int32([0, 2, 4]),
            "out": torch.zeros(4, H),
        },
        ("out",),
    ),
    "first_tokens_linear": (
        lambda: {
            "hidden": torch.zeros(4, H),
            "weight": torch.zeros(C, H),
            "bias": torch.zeros(C),
            "offsets": int32([0, 1, 2]),
            "row_ids": int32([0, 1]),
            "out": torch.zeros(2, C),
        },
        ("out",),
    ),
}
on_each = pytest.mark.parametrize(
    ("backend", "name"),
    [
        pytest.param(p.values[0], name, marks=p.marks)
        for name in OVERLAPS
        for p in backend_params()
        if p.values[0] == "torch" or name in ("exit_step", "gather_rows")
    ],
)


def in_one_buffer(first: torch.Tensor, second: torch.Tensor, shared: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both tensors in one buffer, the second one `shared` bytes before the end of the first."""
    sizes = [x.numel() * x.element_size() for x in (first, second)]
    memory = torch.zeros(sum(sizes) + 64, dtype=torch.uint8)
    start = sizes[0] - shared
    views = memory[: sizes[0]].view(first.dtype), memory[start : start + sizes[1]].view(second.dtype)
    for view, x in zip(views, (first, second), strict=True):
        view.copy_(x.flatten())
    return views[0].view(first.shape), views[1].view(second.shape)


@on_each
def test_overlapping_memory_is_refused(backend, name):
    build, written = OVERLAPS[name]
    op, names = getattr(ops, name), [k for k, v in build().items() if isinstance(v, torch.Tensor)]
    pairs = [(w, other) for w in written for other in names if other != w]
    for first, second in pairs:
        # no tensor is smaller than 8 bytes, and 8 is a multiple of the size of every dtype
        arguments = build()
        arguments[first], arguments[second] = in_one_buffer(arguments[first], arguments[second], 8)
        with pytest.raises(
            ValueError, match=rf"^{name}: expected \w+ to share no memory with [\w\[\]]+; pass a second buffer"
        ):
            op(**arguments, backend=backend)
    for first, second in pairs:
        apart = build()
        gap = -apart[first].numel() * apart[first].element_size() % 8
        apart[first], apart[second] = in_one_buffer(apart[first], apart[second], -gap)
        op(**apart, backend=backend)


def test_bare_compiled_exit_step_refuses_overlapping_memory():
    # a row id overwritten by an answer would index arbitrary memory
    op = ops.bare_op("exit_step", "cpp", "cpu")
    build, written = OVERLAPS["exit_step"]
    names = ["hidden", "offsets", "weight", "bias", "logits", "aux", "row_ids", "state", "answers", "exit_layer"]
    for first, second in [(w, other) for w in written for other in names if other != w and other in build()]:
        arguments = build()
        arguments[first], arguments[second] = in_one_buffer(arguments[first], arguments[second], 8)
        rule = arguments["criterion"]
        with pytest.raises(
            ValueError, match=r"^exit_step_cpp: expected \w+ to share no memory with \w+; pass a second"
        ):
            op(*map(arguments.get, names), rule.name, rule.params(1), "first", 1, 2)


@on_each
def test_other_types_than_dense_tensors_are_refused(backend, name):
    op = getattr(ops, name)
    arguments = OVERLAPS[name][0]()
    with pytest.raises(ValueError, match=rf"^{name}: expected \w+ with values, got a meta tensor"):
        op(**{k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}, backend=backend)
    for argument in [k for k, v in arguments.items() if isinstance(v, torch.Tensor)]:
        for wrong in ([0, 1], 3, np.zeros(2)):
            with pytest.raises(
                TypeError, match=rf"^{name}: expected {argument} to be a tensor, got (list|int|ndarray)"
            ):
                op(**arguments | {argument: wrong}, backend=backend)
        with pytest.raises(ValueError, match=rf"^{name}: expected {argument} .*dense"):
            op(**arguments | {argument: arguments[argument].to_sparse()}, backend=backend)


#: Invalid arguments of exit_step other than tensors -> error and words of its message.
WRONG = {
    "layer_float": ({"layer": 1.0}, TypeError, "expected layer to be a whole number, got 1.0"),
    "layer_negative": (
        {"layer": -3, "criterion": criteria.Entropy(threshold=[0.5])},
        ValueError,
        "expected 1 <= layer <= depth, got layer -3",
    ),
    "layer_bool": ({"layer": True}, TypeError, "expected layer to be a whole number, got True"),
    "depth_beyond_int32": ({"depth": 2**31}, ValueError, "expected depth to be at most 2147483647 .* got 2147483648"),
    "no_criterion": ({"criterion": "entropy"}, TypeError, "expected an instance of a criterion, .* got 'entropy'"),
    "pooling_none": ({"pooling": None}, ValueError, "expected pooling .* got None"),
    "state_none": ({"state": None}, TypeError, "expected state to be a tensor, got NoneType"),
    "row_ids_none": ({"row_ids": None}, TypeError, "expected row_ids to be a tensor, got NoneType"),
    "hidden_without_tokens": ({"hidden": torch.tensor(1.0)}, ValueError, r"expected hidden of shape .* got \[\]"),
    "no_classes": ({"answers": torch.zeros(2, 0)}, ValueError, r"expected answers \[N, C\] .* got \[2, 0\]"),
    "one_class": (
        {"answers": torch.zeros(2, 1), "criterion": criteria.Margin(threshold=0.5)},
        ValueError,
        r"expected answers \[N, C\] with at least 2 classes, which the criterion compares, got \[2, 1\]",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_exit_step_names_the_invalid_argument(backend, name):
    changed, error, words = WRONG[name]
    with pytest.raises(error, match=f"^exit_step: {words}"):
        exit_step(**exit_arguments("first", [1, 0], [0, 1, 2], 2, 2) | changed, backend=backend)
