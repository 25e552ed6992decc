"""The ops on a GPU against the references of the CPU tests; on a CPU some cases run on torch."""

from __future__ import annotations

import itertools

import pytest
import torch
from ops import test_encoder_ops as encoder
from ops import test_exit_step as steps
from ops import test_pack_tokens as packs
from ops import test_resident_exit as residents
from support import encoder_cases
from support.compaction_cases import PATTERNS
from support.encoder_cases import WAYS
from support.exit_step_cases import DTYPES, SETTINGS, SOURCES, Case

from earlyexit_kernels import ops
from earlyexit_kernels.backends import available_backends
from earlyexit_kernels.criteria import Entropy
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
        reason = reasons[backend] if torch.cuda.is_available() else "needs a CUDA device"
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


@everywhere(
    ["rows", "pooling", "side", "dtype"], list(itertools.product((1, 4, 64, 1024), ("first", "mean"), (0, 1), DTYPES))
)
def test_resident_exit_against_torch(rows, side, pooling, dtype, device, backend):
    present = max(1, rows - rows // 4)
    x = residents.resident(rows, present, side)
    for name in ("hidden", "weight", "bias"):
        x[name] = x[name].to(dtype)
    for tile in (1, 7, 128):
        wanted = residents.leave(x, "torch", Entropy(threshold=0.8), pooling=pooling, tile=tile)
        there = {name: tensor.to(device) for name, tensor in x.items()}
        got = residents.leave(there, backend, Entropy(threshold=0.8), pooling=pooling, tile=tile)
        for name, tensor in wanted.items():
            torch.testing.assert_close(got[name].cpu(), tensor, atol=1e-5, rtol=1e-5, equal_nan=True)


class OnDevice:
    """The public ops on CPU tensors, copied to a device and back."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __getattr__(self, name):
        def run(*arguments, **how):
            given = [x for x in (*arguments, *how.values()) if isinstance(x, torch.Tensor)]
            # a tensor that is given twice stays one tensor
            there = {id(x): x.to(self.device) for x in given}
            moved = [there.get(id(x), x) for x in arguments], {name: there.get(id(x), x) for name, x in how.items()}
            getattr(ops, name)(*moved[0], **moved[1])
            for here in given:
                here.copy_(there[id(here)])

        return run


@everywhere(["way", "dtype", "name"], list(itertools.product(WAYS, DTYPES, encoder.LAYOUTS)), ("triton",))
def test_encoder_ops_against_float64(way, dtype, name, device, backend, monkeypatch):
    monkeypatch.setattr(encoder_cases, "ops", OnDevice(device))
    encoder.test_equals_float64_and_writes_only_present_tokens(way, backend, dtype, name)


@everywhere(
    ["counted", "masked", "shape"], list(itertools.product((4096, 0), (True, False), packs.SHAPES)), ("triton",)
)
def test_pack_tokens_in_one_and_two_launches(counted, masked, shape, device, backend, monkeypatch):
    monkeypatch.setattr(packs, "pack_tokens", OnDevice(device).pack_tokens)
    monkeypatch.setattr(packs.op, "COUNTED_TOKENS", counted)
    packs.test_equals_pack(*shape, masked, backend, None)


#: Sizes of BERT-base; on the CPU small ones, which show that the test runs.
SIZES = {"cuda": (768, 3072, 12, (128, 2048, 16384)), "cpu": (16, 32, 2, (8, 32))}
#: Largest distance over the largest number of the answer: sums rounded once.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@everywhere(["dtype"], [(dtype,) for dtype in DTYPES], ("triton",))
def test_token_has_equal_bits_in_every_capacity(dtype, device, backend):
    """The same tokens at the beginning of small buffers, and inside and alone in large ones, which use other tiles."""
    width, inner, heads, capacities = SIZES[device]
    g = torch.Generator().manual_seed(0)
    tokens = capacities[0] // 2
    factors = [(torch.randn(s, generator=g) / width**0.5).to(device, dtype) for s in ((inner, width), (inner,))]
    values, qkv = (torch.randn(tokens, s, generator=g).to(device, dtype) for s in (width, 3 * width))
    found = []
    for capacity, alone in itertools.product(capacities, (False, True)):
        before = 0 if alone or capacity == capacities[0] else capacity // 2 + 3
        ends = [0, before, before + tokens, before + tokens if alone else max(before + tokens, capacity - 5)]
        offsets = torch.tensor(ends, dtype=torch.int32, device=device)
        row_ids = torch.tensor([-1, 0, -1], dtype=torch.int32, device=device)
        x, both = (torch.randn(capacity, v.shape[1], device=device).to(dtype) for v in (values, qkv))
        x[before : before + tokens], both[before : before + tokens] = values, qkv
        product, (attended, normed, summed) = x.new_zeros(capacity, inner), torch.zeros(3, *x.shape).to(x).unbind()
        ops.rows_linear(x, *factors, offsets, product, activation="gelu", backend=backend)
        square = [factor[:width] for factor in factors]
        ops.rows_linear(x, *square, offsets, summed, in_parts=True, backend=backend)
        ops.rows_attention(both, offsets, row_ids, heads, capacity, attended, backend=backend)
        ones = x.new_ones(width)
        ops.rows_add_norm(x, x, ones, ones, 1e-5, offsets, normed, backend=backend)
        results = product, summed, attended, normed
        assert not any(y[ends[-1] :].any() for y in results), "tokens that are not present"
        found.append([y[before : before + tokens] for y in results])
    weight, bias = (factor.float() for factor in factors)
    want = torch.nn.functional.gelu(values.float() @ weight.T + bias)
    assert (found[0][0].float() - want).abs().max() <= TOLERANCE[dtype] * want.abs().max()
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            if device == "cuda":  # on the CPU the rounding of products depends on the number of rows
                assert torch.equal(one, other)
            else:
                torch.testing.assert_close(one, other, atol=2e-2, rtol=2e-2)
