"""compact and gather_rows against plain loops."""

from __future__ import annotations

import pytest
import torch
from support import oracle
from support.compaction_cases import PATTERNS, rows_of

from earlyexit_kernels.ops import compact, gather_rows

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
DEAD, SLACK = 777.0, 5


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("b", [0, 1, 3, 33, 1023, 1024, 1025])
def test_compact(backend, b, pattern):
    row_ids, offsets = rows_of(b, pattern)
    before = row_ids.clone(), offsets.clone()
    planned = compact(row_ids, offsets, backend=backend)
    assert [tensor.tolist() for tensor in planned] == list(oracle.compact(row_ids.tolist(), offsets.tolist()))
    assert [tensor.dtype for tensor in planned] == [torch.int32] * 3
    assert torch.equal(row_ids, before[0]) and torch.equal(offsets, before[1])


def test_new_offsets_start_at_0(backend):
    planned = compact(
        torch.tensor([-1, 5], dtype=torch.int32), torch.tensor([3, 4, 9], dtype=torch.int32), backend=backend
    )
    assert [tensor.tolist() for tensor in planned] == [[5, -1], [0, 5, 5], [1, -1]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 3, 17, 300])
@pytest.mark.parametrize(("b", "pattern"), [(0, "none"), (1, "all"), (3, "alternating"), (9, "none"), (33, "random")])
def test_gather_rows(backend, b, pattern, width, dtype):
    row_ids, offsets = rows_of(b, pattern)
    hidden = torch.randn(int(offsets[-1]) + SLACK, width, generator=torch.Generator().manual_seed(b)).to(dtype)
    hidden[offsets[-1] :] = DEAD
    for i in range(b):
        if row_ids[i] < 0:
            hidden[offsets[i] : offsets[i + 1]] = DEAD
    _, new_offsets, source = compact(row_ids, offsets, backend=backend)
    live = int(new_offsets[-1])
    out, want = (torch.full((live + SLACK, width), torch.nan, dtype=dtype) for _ in range(2))
    oracle.gather_rows(hidden, offsets.tolist(), source.tolist(), new_offsets.tolist(), want)
    kept = hidden.clone()
    assert gather_rows(hidden, offsets, source, new_offsets, out, backend=backend) is None
    assert torch.equal(out[:live], want[:live])
    assert not (out[:live] == DEAD).any() and not out[:live].isnan().any()
    assert out[live:].isnan().all(), "memory beyond the live tokens was written"
    assert torch.equal(hidden, kept)


def test_gather_rows_keeps_bits(backend):
    """NaN payloads, signed zeros and infinities are copied."""
    patterns = torch.tensor([0x7FC00123, 0x7F800000, -0x80000000, 1, 0x3F800000], dtype=torch.int32)
    hidden, out = patterns.view(torch.float32)[:, None].clone(), torch.zeros(5, 1)
    offsets = torch.arange(6, dtype=torch.int32)
    gather_rows(hidden, offsets, torch.arange(5, dtype=torch.int32), offsets, out, backend=backend)
    assert torch.equal(out.view(torch.int32)[:, 0], patterns)


def test_gather_rows_from_a_strided_source(backend):
    hidden = torch.randn(6, 8)[:, ::2]
    offsets = torch.tensor([0, 2, 4, 6], dtype=torch.int32)
    out = torch.full((4, 4), torch.nan)
    source, new_offsets = torch.tensor([0, 2, -1]), torch.tensor([0, 2, 4, 4])
    gather_rows(hidden, offsets, source.int(), new_offsets.int(), out, backend=backend)
    assert torch.equal(out, hidden[[0, 1, 4, 5]])


def int32(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


COMPACT_REFUSED = {
    "row_ids_dtype": ({"row_ids": torch.arange(2)}, ("row_ids", "torch.int32", "got torch.int64")),
    "row_ids_shape": ({"row_ids": torch.zeros(2, 1).int()}, ("row_ids", "[2, 1]")),
    "offsets_dtype": ({"offsets": torch.arange(3)}, ("offsets", "torch.int32", "got torch.int64")),
    "offsets_length": ({"offsets": int32(0, 1)}, ("offsets", "[3]", "got [2]")),
    "two_devices": ({"offsets": int32(0, 1, 2).to("meta")}, ("offsets", "meta", "cpu", "one device")),
}
GATHER_REFUSED = {
    "hidden_shape": ({"hidden": torch.zeros(3)}, ("hidden", "got [3]")),
    "hidden_dtype": ({"hidden": torch.zeros(3, 2).long()}, ("hidden", "torch.float32", "got torch.int64")),
    "out_dtype": ({"out": torch.zeros(3, 2).half()}, ("out", "torch.float32", "got torch.float16")),
    "out_width": ({"out": torch.zeros(3, 4)}, ("out", "2]", "got [3, 4]")),
    "out_strided": ({"out": torch.zeros(2, 3).T}, ("out", "contiguous", "strides (1, 3)")),
    "source_dtype": ({"source": torch.tensor([0, 1])}, ("source", "torch.int32", "got torch.int64")),
    "offsets_dtype": ({"offsets": torch.tensor([0, 1, 3])}, ("offsets", "torch.int32", "got torch.int64")),
    "new_offsets": ({"new_offsets": int32(0, 1)}, ("new_offsets", "[3]", "got [2]")),
    "new_offsets_dtype": ({"new_offsets": torch.tensor([0, 1, 3])}, ("new_offsets", "torch.int32", "torch.int64")),
    "two_devices": ({"source": int32(0, 1).to("meta")}, ("source", "meta", "cpu", "one device")),
}


def refused(op, words, **arguments) -> None:
    with pytest.raises(ValueError) as caught:
        op(**arguments)
    assert all(word in str(caught.value) for word in (f"{op.__name__}: ", *words)), str(caught.value)


@pytest.mark.parametrize("name", COMPACT_REFUSED)
def test_compact_refuses(backend, name):
    changed, words = COMPACT_REFUSED[name]
    refused(compact, words, **{"row_ids": int32(0, 1), "offsets": int32(0, 1, 2), **changed}, backend=backend)


@pytest.mark.parametrize("name", GATHER_REFUSED)
def test_gather_rows_refuses(backend, name):
    changed, words = GATHER_REFUSED[name]
    offsets = int32(0, 1, 3)
    given = {"hidden": torch.randn(3, 2), "offsets": offsets, "source": int32(0, 1), "new_offsets": offsets}
    refused(gather_rows, words, **{**given, "out": torch.zeros(3, 2), **changed}, backend=backend)


def test_strided_offsets(backend):
    hidden, out = torch.arange(8.0).view(4, 2), torch.full((4, 2), torch.nan)
    row_ids, offsets = int32(-1, 9, 5, 9)[::2], int32(0, 9, 1, 9, 4, 9)[::2]
    planned = compact(row_ids, offsets, backend=backend)
    assert [tensor.tolist() for tensor in planned] == [[5, -1], [0, 3, 3], [1, -1]]
    strided = [torch.stack([tensor] * 2, dim=-1)[..., 0] for tensor in planned]
    gather_rows(hidden, offsets, strided[2], strided[1], out, backend=backend)
    assert torch.equal(out[:3], hidden[1:]) and out[3].isnan().all()


def test_compiled_caller(backend):
    """The checks run outside of the graph, the ops in it."""
    row_ids, offsets, hidden = int32(1, -1, 0), int32(0, 2, 3, 5), torch.randn(5, 4)

    def moved(row_ids, offsets):
        _, new_offsets, source = compact(row_ids, offsets, backend=backend)
        out = torch.zeros(4, 4)
        gather_rows(hidden, offsets, source, new_offsets, out, backend=backend)
        return out

    compiled = torch.compile(moved, backend="aot_eager")
    assert torch.equal(compiled(row_ids, offsets), moved(row_ids, offsets))
    with pytest.raises(ValueError, match="compact: expected distinct row_ids, got 1 more than once"):
        compiled(int32(1, 1, 0), offsets)
