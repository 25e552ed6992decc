"""pack_tokens against `packing.pack`, in buffers of arbitrary contents."""

from __future__ import annotations

import importlib

import pytest
import torch
from support.backends import backend_params

from earlyexit_kernels.engine.packing import pack
from earlyexit_kernels.ops import pack_tokens

STALE = 10**6


#: The state of a criterion before layer 1, and the number of counts.
STATE, CELLS = (0.5, -1.0, 7.0), 15
op = importlib.import_module("earlyexit_kernels.ops.pack_tokens")


@pytest.fixture(params=backend_params(("torch", "triton")))
def backend(request) -> str:
    return request.param


@pytest.fixture(params=[False, True], ids=["one_launch", "two_launches"])
def launches(request, monkeypatch) -> None:
    """Each program counts the tokens of all rows, or another kernel has counted them."""
    monkeypatch.setattr(op, "COUNTED_TOKENS", 0 if request.param else op.COUNTED_TOKENS)
    if not request.param:
        monkeypatch.setattr(op, "count_tokens_kernel", None)


def packed(
    backend, ids, *, mask=None, positions=None, types=None, rows=8, width=16, first_state=STATE
) -> dict[str, torch.Tensor]:
    """Run the op on a batch in buffers ``[rows, width]`` with arbitrary contents elsewhere."""
    first_state = torch.tensor(first_state)
    n, s = ids.shape
    inputs = []
    for value in (ids, mask, positions, types):
        buffer = torch.full((rows, width), STALE)
        if value is not None:
            buffer[:n, :s] = value
        inputs.append(buffer)
    batch = torch.tensor([n, s, *(x is not None for x in (mask, positions, types))], dtype=torch.int32)
    found, row_ids, offsets, counts = (
        torch.full(shape, STALE, dtype=torch.int32) for shape in ((2, rows), (rows,), (rows + 1,), (CELLS,))
    )
    state = torch.full((len(first_state), rows), torch.nan)
    tokens = torch.full((4, rows * width), STALE)
    ids, mask, positions, types = inputs
    pack_tokens(
        batch=batch, ids=ids, mask=mask, positions=positions, types=types, found=found, row_ids=row_ids,
        offsets=offsets, tokens=tokens, counts=counts, first_state=first_state, state=state, backend=backend,
    )  # fmt: skip
    assert torch.equal(state, first_state[:, None].expand_as(state)) and not counts[4:].any()
    return {"found": found, "row_ids": row_ids, "offsets": offsets, "tokens": tokens, "counts": counts}


def batch_of(n, s, *, masked=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids, positions, types = (torch.randint(0, high, (n, s), generator=g) for high in (999, 99, 2))
    mask = None
    if masked:
        mask = torch.randint(0, 3, (n, s), generator=g)
        mask[:, 0] = 1
    return ids, mask, positions, types


SHAPES = [(1, 1), (1, 16), (3, 5), (8, 16), (5, 7)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("n", "s"), SHAPES)
def test_equals_pack(n, s, masked, backend, launches):
    ids, mask, positions, types = batch_of(n, s, masked=masked)
    out, expected = packed(backend, ids, mask=mask, positions=positions, types=types), pack(ids, mask)
    kept = int(expected.offsets[-1])
    assert torch.equal(out["offsets"][: n + 1], expected.offsets) and (out["offsets"][n:] == kept).all()
    assert out["row_ids"].tolist() == [*range(n), *[-1] * (8 - n)]
    assert out["counts"][:4].tolist() == [n, kept, 0, kept]
    keep = torch.ones(n, s) if mask is None else mask != 0
    assert torch.equal(out["found"][:, :n], torch.stack((keep.sum(1), keep[:, 0])).int())
    assert not out["found"][:, n:].any()
    columns = torch.arange(s).expand(n, s)
    for place, values in enumerate((ids, positions, types, columns)):
        assert torch.equal(out["tokens"][place, :kept], expected.take(values)[0])
    assert (out["tokens"][:, kept:] == STALE).all()


def test_default_positions_and_types(backend):
    ids, mask, *_ = batch_of(3, 5)
    out, expected = packed(backend, ids, mask=mask), pack(ids, mask)
    kept = int(expected.offsets[-1])
    assert torch.equal(out["tokens"][1, :kept], expected.take(torch.arange(5).expand(3, 5))[0])
    assert (out["tokens"][2, :kept] == 0).all()


def test_rows_without_tokens_or_with_a_masked_first_token(backend, launches):
    ids, mask, *_ = batch_of(5, 7)
    mask[1] = 0
    mask[2, 0], mask[2, 3] = 0, 1
    mask[4] = 0
    out, expected = packed(backend, ids, mask=mask), pack(ids, mask)
    assert torch.equal(out["offsets"][:6], expected.offsets) and out["counts"][2] == 1
    assert torch.equal(out["tokens"][0, : expected.offsets[-1]], expected.take(ids)[0])


def test_rows_longer_than_a_block(backend, monkeypatch):
    monkeypatch.setattr(op, "MAX_COLUMNS", 4)
    ids, mask, *_ = batch_of(3, 11)
    mask[1, :5] = 0
    out, expected = packed(backend, ids, mask=mask), pack(ids, mask)
    assert torch.equal(out["tokens"][0, : expected.offsets[-1]], expected.take(ids)[0])
    assert out["counts"][2] == 1


def test_criterion_without_a_state(backend):
    """Most rules keep none."""
    ids, mask, *_ = batch_of(3, 5)
    want = packed(backend, ids, mask=mask)
    got = packed(backend, ids, mask=mask, first_state=())
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_one_row_of_a_buffer_for_one(backend, launches):
    """The kernel for a single row."""
    ids, mask, *_ = batch_of(1, 16)
    mask[0, 4:] = 0
    out = packed(backend, ids, mask=mask, rows=1)
    assert out["offsets"].tolist() == [0, int((mask != 0).sum())]
    assert torch.equal(out["tokens"][0, : out["offsets"][1]], ids[mask != 0])


def test_empty_batch(backend, launches):
    out = packed(backend, torch.zeros(0, 0, dtype=torch.int64))
    assert out["counts"].tolist() == [0] * CELLS and (out["offsets"] == 0).all() and (out["row_ids"] == -1).all()


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("batch", torch.tensor([9, 4, 0, 0, 0], dtype=torch.int32), "at most 8 rows of 16 tokens, got 9 of 4"),
        ("mask", torch.zeros(8, 15, dtype=torch.int64), r"expected mask of shape \[8, 16\], got \[8, 15\]"),
        ("tokens", torch.zeros(4, 127, dtype=torch.int64), r"expected tokens \[4, T\] with T >= 128, got T 127"),
        ("counts", torch.zeros(4), "expected counts to be torch.int32, got torch.float32"),
        ("counts", torch.zeros(3, dtype=torch.int32), r"expected counts \[M\] with M >= 4, got M 3"),
        ("state", torch.zeros(2, 8), r"expected state of shape \[3, 8\], got \[2, 8\]"),
    ],
)
def test_invalid_arguments_are_refused(backend, name, tensor, message):
    inputs = {name: torch.zeros(8, 16, dtype=torch.int64) for name in ("ids", "mask", "positions", "types")}
    shapes = {"batch": (5,), "found": (2, 8), "row_ids": (8,), "offsets": (9,), "counts": (4,)}
    arguments = {
        **inputs,
        **{name: torch.zeros(shape, dtype=torch.int32) for name, shape in shapes.items()},
        "tokens": torch.zeros(4, 128, dtype=torch.int64),
        "first_state": torch.tensor(STATE),
        "state": torch.zeros(3, 8),
    }
    pack_tokens(**arguments, backend=backend)
    with pytest.raises(ValueError, match=f"pack_tokens: .*{message}"):
        pack_tokens(**arguments | {name: tensor}, backend=backend)
