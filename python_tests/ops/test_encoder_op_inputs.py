"""Invalid arguments of the ops of an encoder layer, and the error messages."""

from __future__ import annotations

import pytest
import torch
from support.backends import backend_params

from earlyexit_kernels import ops

T, R, H, N = 4, 2, 6, 5


def int32(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def given(op) -> dict:
    """Valid arguments of `op`."""
    weight, bias, offsets, row_ids = torch.zeros(N, H), torch.zeros(N), int32(0, 1, 3), int32(1, 0)
    return {
        "rows_linear": {"x": torch.zeros(T, H), "weight": weight, "bias": bias, "out": torch.zeros(T, N)},
        "first_tokens_linear": {
            "hidden": torch.zeros(2 * T, H),
            "weight": weight,
            "bias": bias,
            "row_ids": row_ids,
            "out": torch.zeros(R, N),
        },
        "rows_attention": {
            "qkv": torch.zeros(T, 3 * H),
            "row_ids": row_ids,
            "heads": 2,
            "longest": 2,
            "out": torch.zeros(T, H),
        },
        "rows_rotary": {
            "qkv": torch.zeros(T, 3 * H),
            "cos": torch.zeros(T, H),
            "sin": torch.zeros(T, H),
            "starts": int32(1, 0),
            "row_ids": row_ids,
            "heads": 1,
            "longest": 2,
        },
        "rows_mean": {"hidden": torch.zeros(2 * T, H), "row_ids": row_ids, "out": torch.zeros(R, H)},
        "rows_glu": {"x": torch.zeros(T, 2 * H), "out": torch.zeros(T, H), "activation": "gelu"},
        "rows_embed": {
            "tokens": torch.tensor([[4, 0, 1, 9], [2, 1, 0, 9], [1, 0, 0, 9], [9, 9, 9, 9]]),
            "words": torch.zeros(N, H),
            "positions": torch.zeros(3, H),
            "types": torch.zeros(2, H),
            "weight": torch.zeros(H),
            "bias": torch.zeros(H),
            "eps": 1e-5,
            "out": torch.zeros(T, H),
        },
        "rows_add_norm": {
            "x": torch.zeros(T, H),
            "residual": torch.zeros(T, H),
            "weight": torch.zeros(H),
            "bias": torch.zeros(H),
            "eps": 1e-5,
            "out": torch.zeros(T, H),
        },
    }[op] | {"offsets": offsets}


OFFSETS = {
    "offsets_dtype": ({"offsets": torch.tensor([0, 1, 3])}, ("offsets", "torch.int32", "got torch.int64")),
    "offsets_shape": ({"offsets": int32(0, 1, 3)[None]}, ("offsets", "[1, 3]")),
    "offsets_decrease": ({"offsets": int32(0, 3, 1)}, ("non-decreasing", "minimum step of -2", "cumulative")),
    "offsets_below_0": ({"offsets": int32(-1, 1, 3)}, ("from 0 or above", "-1 to 3")),
    "offsets_beyond": ({"offsets": int32(6, 7, 9)}, ("at most 8 tokens", "6 to 9")),
    "too_many_tokens": ({"offsets": int32(0, 3, 5)}, ("at most 4 present tokens", "got 5", "larger buffers")),
    "two_devices": ({"offsets": int32(0, 1, 3).to("meta")}, ("offsets", "meta", "cpu", "one device")),
}
OUT = {
    "out_dtype": ({"out": torch.zeros(T, H).double()}, ("out", "got torch.float64")),
    "out_strided": ({"out": torch.zeros(H, T).T}, ("out", "contiguous", "strides (1, 4)")),
}
PRODUCT = {
    "weight_dtype": ({"weight": torch.zeros(N, H).half()}, ("weight", "torch.float32", "got torch.float16")),
    "weight_width": ({"weight": torch.zeros(N, 7)}, ("weight", "['*', 6]", "got [5, 7]")),
    "bias_shape": ({"bias": torch.zeros(N + 1)}, ("bias", "[5]", "got [6]")),
    "activation": ({"activation": "silu"}, ("activation", "'gelu_tanh'", "got 'silu'")),
}
ROW_IDS = {
    "row_ids_dtype": ({"row_ids": torch.arange(R)}, ("row_ids", "torch.int32", "got torch.int64")),
    "row_ids_and_offsets": ({"row_ids": int32(0, 1, 2)}, ("offsets", "[4]", "got [3]")),
}
#: Valid ones for a window.
NEAR = {"columns": torch.arange(T), "starts": int32(1, 0)}
STARTS = {
    "starts_dtype": ({"starts": torch.arange(R)}, ("starts", "torch.int32", "got torch.int64")),
    "starts_of_fewer_rows": ({"starts": int32(0)}, ("row_ids below the 1 rows of starts", "got 1")),
    "starts_beyond": ({"starts": int32(T - 1, 0)}, ("starts of rows within 4 tokens", "0 to 5", "offsets")),
    "starts_below_0": ({"starts": int32(-1, 0)}, ("starts of rows within 4 tokens", "got tokens -1 to 1")),
}
#: Op -> case -> the invalid arguments, and words of the message.
REFUSED = {
    "rows_linear": {
        **OFFSETS,
        **OUT,
        **PRODUCT,
        "no_offsets": ({"offsets": int32()}, ("[R + 1]", "pass one offset")),
        "x_shape": ({"x": torch.zeros(T + 1, H)}, ("x", "[4, '*']", "got [5, 6]")),
        "x_of_two_sides": ({"absolute": True}, ("x", "[8, '*']", "got [4, 6]")),
        "out_width": ({"out": torch.zeros(T, N + 1)}, ("out", "[4, 5]", "got [4, 6]")),
    },
    "first_tokens_linear": {
        **OFFSETS,
        **PRODUCT,
        **ROW_IDS,
        "empty_row": ({"offsets": int32(0, 1, 1)}, ("one token in every present row", "row id to -1")),
        "out_rows": ({"out": torch.zeros(R + 1, N)}, ("out", "[2, 5]", "got [3, 5]")),
        "hidden_dtype": ({"hidden": torch.zeros(2 * T, H).double()}, ("hidden", "got torch.float64")),
    },
    "rows_attention": {
        **OFFSETS,
        **OUT,
        **ROW_IDS,
        "qkv_width": ({"qkv": torch.zeros(T, 2 * H)}, ("qkv", "[4, 18]", "got [4, 12]")),
        "heads": ({"heads": 4}, ("heads", "divide 6", "got 4")),
        "no_heads": ({"heads": 0}, ("heads", "got 0")),
        "longest": ({"longest": 1}, ("at most 1 tokens", "got 2", "the maximum length")),
        "no_window": ({"window": 0, **NEAR}, ("window", "at least 1", "got 0")),
        "columns_alone": (NEAR, ("only with a window",)),
        "columns_shape": ({"window": 2, **NEAR, "columns": torch.zeros(2, 2)}, ("columns", "['*']", "got [2, 2]")),
        "columns_dtype": ({"window": 2, **NEAR, "columns": int32(0, 1, 2)}, ("columns", "got torch.int32")),
        "too_few_columns": ({"window": 2, **NEAR, "columns": torch.arange(2)}, ("within 2 tokens", "0 to 3", "before")),
    },
    "rows_rotary": {
        **OFFSETS,
        **ROW_IDS,
        **STARTS,
        "heads": ({"heads": 2}, ("heads", "a third of 18", "even parts", "got 2")),
        "no_heads": ({"heads": 0}, ("heads", "got 0")),
        "longest": ({"longest": 1}, ("at most 1 tokens", "got 2", "the maximum length")),
        "cos_width": ({"cos": torch.zeros(T, 2)}, ("cos", "['*', 6]", "got [4, 2]")),
        "sin_shape": ({"sin": torch.zeros(T + 1, H)}, ("sin", "[4, 6]", "got [5, 6]")),
        "cos_dtype": ({"cos": torch.zeros(T, H).half()}, ("cos", "got torch.float16")),
        "qkv_strided": ({"qkv": torch.zeros(3 * H, T).T}, ("qkv", "contiguous", "strides (1, 4)")),
    },
    "rows_mean": {
        **OFFSETS,
        **ROW_IDS,
        "empty_row": ({"offsets": int32(0, 1, 1)}, ("one token in every present row", "row id to -1")),
        "out_rows": ({"out": torch.zeros(R + 1, H)}, ("out", "[2, 6]", "got [3, 6]")),
        "out_dtype": ({"out": torch.zeros(R, H).half()}, ("out", "got torch.float16")),
        "hidden_dtype": ({"hidden": torch.zeros(2 * T, H).double()}, ("hidden", "got torch.float64")),
    },
    "rows_glu": {
        **OFFSETS,
        **OUT,
        "x_width": ({"x": torch.zeros(T, H)}, ("x", "[4, 12]", "got [4, 6]")),
        "activation": ({"activation": "swish"}, ("activation", "'gelu_tanh'", "got 'swish'")),
    },
    "rows_embed": {
        **OFFSETS,
        **OUT,
        "tokens_shape": ({"tokens": torch.zeros(3, T).long()}, ("tokens", "[4, 4]", "got [3, 4]")),
        "tokens_dtype": (
            {"tokens": torch.zeros(4, T, dtype=torch.int32)},
            ("tokens", "torch.int64", "got torch.int32"),
        ),
        "words_width": ({"words": torch.zeros(N, 7)}, ("words", "['*', 6]", "got [5, 7]")),
        "positions_dtype": ({"positions": torch.zeros(3, H).half()}, ("positions", "got torch.float16")),
        "bias": ({"bias": torch.zeros(H + 1)}, ("bias", "[6]", "got [7]")),
        "word": ({"words": torch.zeros(4, H)}, ("indices of words in [0, 3]", "got 0 to 4")),
        "position": ({"positions": torch.zeros(2, H)}, ("indices of positions in [0, 1]", "got 0 to 2")),
        "type": ({"tokens": -torch.ones(4, T).long(), "positions": None}, ("indices of words", "got -1 to -1")),
    },
    "rows_add_norm": {
        **OFFSETS,
        **OUT,
        "residual_dtype": ({"residual": torch.zeros(T, H).half()}, ("residual", "got torch.float16")),
        "residual_of_two_sides": ({"residual_absolute": True}, ("residual", "[8, 6]", "got [4, 6]")),
        "out_of_two_sides": ({"out_absolute": True}, ("out", "[8, 6]", "got [4, 6]")),
        "weight": ({"weight": torch.zeros(H + 1)}, ("weight", "[6]", "got [7]")),
        "total_shape": ({"total": torch.zeros(T + 1, H)}, ("total", "[4, 6]", "got [5, 6]")),
        "total_dtype": ({"total": torch.zeros(T, H).half()}, ("total", "got torch.float16")),
        "alone_of_two_sides": ({"x": None, "residual_absolute": True}, ("out", "[2, 6]", "got [4, 6]")),
    },
}
CASES = [(op, case) for op, cases in REFUSED.items() for case in cases]
on_both = pytest.mark.parametrize("backend", backend_params(("torch", "triton")))


@pytest.mark.parametrize(("op", "case"), CASES)
@on_both
def test_refuses(op, case, backend):
    changed, words = REFUSED[op][case]
    with pytest.raises(ValueError) as caught:
        getattr(ops, op)(**{**given(op), **changed}, backend=backend)
    assert all(word in str(caught.value) for word in (f"{op}: ", *words)), str(caught.value)


@pytest.mark.parametrize("op", REFUSED)
@on_both
def test_accepts_the_unchanged_arguments(op, backend):
    arguments = given(op)
    assert getattr(ops, op)(**arguments, backend=backend) is None


@pytest.mark.parametrize(
    ("op", "name"), [("rows_linear", "x"), ("first_tokens_linear", "hidden"), ("rows_attention", "qkv")]
)
@on_both
def test_refuses_overlapping_memory(op, name, backend):
    arguments = given(op)
    read, out = arguments[name], arguments["out"]
    memory = torch.zeros(read.numel() + out.numel() - 1)
    arguments |= {name: memory[: read.numel()].view_as(read), "out": memory[-out.numel() :].view_as(out)}
    with pytest.raises(ValueError, match=rf"{op}: expected out to share no memory with {name}; pass a second buffer"):
        getattr(ops, op)(**arguments, backend=backend)


@pytest.mark.parametrize("shift", [0, H])
@on_both
def test_norm_in_place_requires_equal_positions(backend, shift):
    """Otherwise one program reads what another one has written."""
    hidden, arguments = torch.zeros(2 * T + 1, H).view(-1), given("rows_add_norm")
    arguments["residual"] = hidden[shift : shift + T * H].view(T, H)
    arguments["out"] = hidden[: 2 * T * H].view(2 * T, H)
    with pytest.raises(ValueError, match="rows_add_norm: expected out to share no memory with residual"):
        ops.rows_add_norm(**arguments, out_absolute=True, backend=backend)


@pytest.mark.parametrize("op", sorted(REFUSED.keys() - {"first_tokens_linear", "rows_embed"}))
def test_refuses_unsupported_back_end(op):
    with pytest.raises(ValueError, match=r"backend: expected one of \('auto', 'torch', 'triton'\), got 'cpp'"):
        getattr(ops, op)(**given(op), backend="cpp")


def test_strided_offsets_and_row_ids():
    arguments = given("rows_attention")
    arguments["qkv"] = torch.randn(T, 3 * H)
    want, got = torch.zeros(T, H), torch.zeros(T, H)
    ops.rows_attention(**arguments | {"out": want})
    strided = {name: torch.stack([arguments[name]] * 2, dim=-1)[..., 0] for name in ("offsets", "row_ids", "qkv")}
    ops.rows_attention(**arguments | strided | {"out": got})
    assert torch.equal(got, want) and got.any()
