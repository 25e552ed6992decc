"""The ops on a GPU against the references of the CPU tests; on a CPU some cases run on torch."""

from __future__ import annotations

import itertools

import pytest
import torch
from ops import test_exit_step as steps
from support.backends import missing_reason
from support.compaction_cases import PATTERNS
from support.exit_step_cases import DTYPES, SETTINGS, SOURCES, Case

from earlyexit_kernels.backends import available_backends
from earlyexit_kernels.ops import compact, gather_rows


def everywhere(names, cases, backends=("triton", "cpp"), compiled=None):
    """Parametrize with all cases on a GPU for each back-end, and some on the CPU, which show that the test runs.

    Args:
        names: of a case's arguments.
        cases: tuples of values.
        backends: of the op.
        compiled: cases for Triton, which takes seconds to compile each; default: all.
    """
    reasons, params = available_backends("cuda"), []
    for backend in backends:
        reason = missing_reason(reasons[backend]) if torch.cuda.is_available() else "needs a CUDA device"
        marks = [pytest.mark.gpu, pytest.mark.skipif(bool(reason), reason=reason)]
        mine = compiled if compiled is not None and backend == "triton" else cases
        params += [pytest.param("cuda", backend, *case, marks=marks, id=_id("cuda", backend, *case)) for case in mine]
    few = cases[:: max(1, len(cases) // 6)]
    params += [pytest.param("cpu", "torch", *case, id=_id("cpu", *case)) for case in few]
    return pytest.mark.parametrize(("device", "backend", *names), params)


def _id(*values) -> str:
    return "-".join(str(value).removeprefix("torch.") for value in values)


#: Every criterion on every kind of input, and one in every dtype with few and many classes, one row and none.
CASES = [
    Case(name, source, torch.float32, 33, max(c for c in SETTINGS[name].classes if c < 100))
    for name in SETTINGS
    for source in SOURCES
]
CASES += [Case("entropy", source, dtype, b, c) for source in SOURCES for dtype in DTYPES for b, c in ((1, 2), (7, 17))]
CASES += [Case("dact", "mean", dtype, 33, 3) for dtype in DTYPES] + [Case("q_exit", "first", DTYPES[0], 0, 3)]
CASES += [Case("entropy", "mean", torch.float32, 1024, 3), Case("entropy", "mean", torch.float16, 7, 150)]
FEWER = [case for case in CASES if case.rule == "entropy" or case.source == "mean"]


@everywhere(["case"], [(case,) for case in CASES], ("torch", "triton", "cpp"), compiled=[(case,) for case in FEWER])
def test_exit_step_against_the_oracle(case, device, backend, count_flips):
    steps.follow(backend, case, count_flips, device)


@everywhere(["pattern", "rows", "dtype"], list(itertools.product(PATTERNS, (1, 33, 3000), DTYPES)))
def test_compact_and_gather_rows(pattern, rows, dtype, device, backend):
    g = torch.Generator().manual_seed(rows)
    lengths = torch.randint(1, 6, (rows,), generator=g)
    offsets = torch.cat((torch.zeros(1), lengths.cumsum(0))).to(torch.int32)
    row_ids = torch.arange(rows, dtype=torch.int32).masked_fill(~PATTERNS[pattern](rows), -1)
    hidden = torch.randn(int(offsets[-1]), 24, generator=g).to(dtype)
    wanted = compact(row_ids, offsets, backend="torch")
    got = compact(row_ids.to(device), offsets.to(device), backend=backend)
    for one, other in zip(wanted, got, strict=True):
        assert torch.equal(one, other.cpu())
    _, new_offsets, source = wanted
    out = torch.full_like(hidden, -7.0)
    moved = [x.to(device) for x in (hidden, offsets, source, new_offsets, out)]
    gather_rows(hidden, offsets, source, new_offsets, out, backend="torch")
    gather_rows(*moved, backend=backend)
    assert torch.equal(moved[-1].cpu(), out)
