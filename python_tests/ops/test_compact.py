"""compact and gather_rows against plain loops."""

from __future__ import annotations

import pytest
import torch
from support import oracle
from support.compaction_cases import PATTERNS, rows_of
from support.op_calls import int32

from earlyexit_kernels.ops import compact, gather_rows

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
DEAD, SLACK = 777.0, 5


@pytest.fixture
def filled_memory():
    """New tensors hold the greatest number, not what was in their memory before, which may be right."""
    torch.use_deterministic_algorithms(True)  # torch.utils.deterministic.fill_uninitialized_memory is on by default
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("filled_memory")
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
    planned = compact(int32([-1, 5]), int32([3, 4, 9]), backend=backend)
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


def test_compiled_caller(backend):
    """The checks run outside of the graph, the ops in it."""
    row_ids, offsets, hidden = int32([1, -1, 0]), int32([0, 2, 3, 5]), torch.randn(5, 4)

    def moved(row_ids, offsets):
        _, new_offsets, source = compact(row_ids, offsets, backend=backend)
        out = torch.zeros(4, 4)
        gather_rows(hidden, offsets, source, new_offsets, out, backend=backend)
        return out

    compiled = torch.compile(moved, backend="aot_eager")
    assert torch.equal(compiled(row_ids, offsets), moved(row_ids, offsets))
    with pytest.raises(ValueError, match="compact: expected distinct row_ids, got 1 more than once"):
        compiled(int32([1, 1, 0]), offsets)
