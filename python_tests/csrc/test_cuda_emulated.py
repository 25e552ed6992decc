"""The CUDA ops, emulated on the CPU thread by thread by `support.cuda_emulation`.

Tests of every back-end run here once more, with the fixture `backend` of this file, beside those of what only CUDA
kernels have: packs, alignment, shared memory and many blocks.
"""

from __future__ import annotations

import pytest
import torch
from criteria.test_decisions import test_rows_leave_as_computed_by_hand, test_ties_go_to_the_lowest_class  # noqa: F401
from ops import test_compact as compaction
from ops import test_exit_step as steps
from ops.test_compact import (  # noqa: F401
    filled_memory,
    test_compact,
    test_gather_rows,
    test_gather_rows_keeps_bits,
    test_new_offsets_start_at_0,
)
from ops.test_exit_step import (  # noqa: F401
    test_decisions_at_the_threshold_do_not_depend_on_the_batch,
    test_invalid_row_keeps_its_state_and_leaves_at_the_last_layer,
    test_rows_that_have_left_do_not_change,
    test_step_after_compaction,
    test_unneeded_aux_is_not_read,
)
from support import cuda_emulation, oracle
from support.exit_step_cases import DTYPES, SETTINGS, SOURCES, Case, memory

from earlyexit_kernels.criteria import Entropy, FullDepth
from earlyexit_kernels.ops import compact, exit_step, gather_rows
from earlyexit_kernels.ops import schema as op_schemas

OPS = ("exit_step", "compact", "gather_rows")
#: Back-end name under which the emulated ops replace the real ones; torch is always available.
BACKEND = "torch"


@pytest.fixture(scope="module")
def ops(tmp_path_factory):
    if cuda_emulation.compiler() is None:
        pytest.skip("there is no C++ compiler; set CXX or install one")
    library = torch.library.Library(cuda_emulation.NAMESPACE, "DEF")
    for name in OPS:
        schema = str(op_schemas.op_of(name, "torch")._schema).partition("(")[2]
        library.define(f"{name}_cpp({schema}")
    cuda_emulation.load(tmp_path_factory.mktemp("emulated"))
    namespace = getattr(torch.ops, cuda_emulation.NAMESPACE)
    yield {name: getattr(namespace, f"{name}_cpp").default for name in OPS}
    library._destroy()


@pytest.fixture(autouse=True)
def backend(ops, monkeypatch) -> str:
    """Let the public functions call the emulated ops, under the name that is returned."""
    for name in OPS:
        monkeypatch.setitem(op_schemas._OPS[name], BACKEND, ops[name])
    return BACKEND


#: Every rule on both kinds of input, and one rule on every kind of input and number of classes.
CASES = [
    Case(name, source, dtype, 33, 3 if 3 in SETTINGS[name].classes else 1)
    for name in SETTINGS
    for source, dtype in (("mean", torch.float32), ("logits", torch.float16))
]
CASES += [Case("entropy", source, dtype, b, c) for source in SOURCES for dtype in DTYPES for b, c in ((1, 2), (7, 17))]
CASES += [Case("dact", "mean", torch.bfloat16, 7, 17), Case("entropy", "mean", torch.float32, 7, 150)]
CASES += [Case("q_exit", source, torch.float32, 0, 3) for source in SOURCES]


@pytest.mark.sample(6)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_oracle(case, count_flips):
    steps.follow(BACKEND, case, count_flips)


@pytest.mark.parametrize(("name", "source"), [("dact", "mean"), ("q_exit", "first"), ("entropy", "logits")])
def test_bits_of_a_row_do_not_depend_on_the_batch(name, source):
    steps.test_bits_of_a_row_do_not_depend_on_the_batch(BACKEND, name, source)


def head(width, dtype, pooling, lengths=(3, 1, 70, 12), classes=3, shift=0):
    """Return arguments of exit_step for rows of these lengths; hidden states and weights are misaligned by `shift`."""
    g = torch.Generator().manual_seed(width)
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    hidden, weight = (
        torch.empty(shift + n * width, dtype=dtype)[shift:].view(n, width) for n in (int(offsets[-1]), classes)
    )
    hidden.copy_(torch.randn(hidden.shape, generator=g) + 0.5)
    weight.copy_(torch.randn(weight.shape, generator=g) / width**0.5)
    bias = torch.randn(classes, generator=g).to(dtype)
    return {"hidden": hidden, "weight": weight, "bias": bias, "offsets": offsets, "pooling": pooling}


def step(criterion=None, *, rows=4, classes=3, depth=1, row_ids=None, **inputs) -> dict[str, torch.Tensor]:
    """Run layer 1, by default the only one, at which all rows leave; return the counts and what was written."""
    criterion = criterion or FullDepth()
    written = memory(criterion, rows, classes)
    written["row_ids"] = torch.arange(rows, dtype=torch.int32) if row_ids is None else row_ids
    counts = exit_step(criterion=criterion, layer=1, depth=depth, backend=BACKEND, **inputs, **written)
    return {"counts": counts, **written}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pooling", ["first", "mean"])
@pytest.mark.parametrize("width", [1, 3, 24, 768, 4104])
def test_widths_and_alignment(width, pooling, dtype):
    """4104 two-byte values are one pack more than a block has threads."""
    given = head(width, dtype, pooling)
    hidden, weight, bias = (given[name].double() for name in ("hidden", "weight", "bias"))
    rows = hidden.split(given["offsets"].diff().tolist())
    pooled = torch.stack([row.mean(dim=0) if pooling == "mean" else row[0] for row in rows])
    answers = step(**given)["answers"]
    torch.testing.assert_close(answers.double(), pooled @ weight.T + bias, rtol=1e-5, atol=1e-5)
    shifted = head(width, dtype, pooling, shift=1)
    for changed in ({"hidden": shifted["hidden"]}, shifted):
        assert torch.equal(step(**given | changed)["answers"], answers), "bits depend on the alignment"


@pytest.mark.parametrize("classes", [6000, 6100])
def test_classes_beyond_shared_memory(classes):
    logits = torch.randn(3, classes)
    entropy = torch.distributions.Categorical(logits=logits.double()).entropy()
    threshold = float(entropy.sort().values[1:].mean())
    got = step(Entropy(threshold=threshold), rows=3, classes=classes, depth=2, logits=logits)
    left = entropy < threshold
    assert left.any() and got["counts"].tolist() == [int((~left).sum())] * 2 + [0]
    assert torch.equal(got["row_ids"] < 0, left) and torch.equal(got["answers"][left], logits[left])


def test_classes_of_a_head_beyond_shared_memory():
    given = head(24, torch.float32, "first", classes=6000)
    first = given["hidden"][given["offsets"][:-1].long()]
    torch.testing.assert_close(step(**given, classes=6000)["answers"], first @ given["weight"].T + given["bias"])


def test_large_batch():
    rows = 1500
    logits, row_ids = torch.randn(rows, 2), torch.arange(rows, dtype=torch.int32)
    logits[::7] = torch.nan
    row_ids[3] = -1
    offsets = torch.arange(0, 3 * rows + 1, 3, dtype=torch.int32)
    got = step(rows=rows, classes=2, depth=2, row_ids=row_ids, logits=logits, offsets=offsets)
    assert got["counts"].tolist() == [rows - 1, 3 * rows - 3, len(logits[::7])]


#: Width, and words of the error. At 0 the weight would be a null pointer, which stands for given logits in the kernel.
WIDTHS = {0: r"got \[1, 0\]", 2**26 + 8: "of width at most 67108864, got 67108872"}


@pytest.mark.parametrize("width", WIDTHS)
def test_widths_that_the_kernel_cannot_take_are_refused(width, ops):
    hidden, weight = (torch.empty(1, width, dtype=torch.float16) for _ in range(2))
    tensors = (hidden, None, weight, torch.empty(1).half(), None, None, torch.zeros(1).int())
    with pytest.raises(ValueError, match=f"exit_step_cpp: expected hidden .*{WIDTHS[width]}"):
        ops["exit_step"](*tensors, *memory(FullDepth(), 1, 1).values(), FullDepth.name, [], "none", 1, 2)


@pytest.mark.parametrize("pattern", compaction.PATTERNS)
@pytest.mark.parametrize("b", [8192, 8195])
def test_compact_in_several_ranges(b, pattern):
    compaction.test_compact(BACKEND, b, pattern)


@pytest.mark.parametrize("shift", [0, 1, 2, 4, 8])
def test_gather_rows_at_any_alignment(shift):
    row_ids, offsets = compaction.rows_of(33, "random")
    hidden, out = (torch.zeros(int(offsets[-1]) * 24 + 8, dtype=torch.float16) for _ in range(2))
    hidden, out = hidden[shift:], out[8 - shift :]
    hidden, out = (x[: int(offsets[-1]) * 24].view(-1, 24) for x in (hidden, out))
    hidden.copy_(torch.randn(hidden.shape))
    _, new_offsets, source = compact(row_ids, offsets, backend=BACKEND)
    gather_rows(hidden, offsets, source, new_offsets, out, backend=BACKEND)
    want = torch.zeros_like(out)
    oracle.gather_rows(hidden, offsets.tolist(), source.tolist(), new_offsets.tolist(), want)
    assert torch.equal(out, want)


def test_overlapping_buffers_are_refused(ops):
    hidden, offsets, source = torch.zeros(4, 2), torch.tensor([0, 1]).int(), torch.zeros(1).int()
    for given, out in ((hidden[:3], hidden[1:]), (hidden, hidden)):
        with pytest.raises(ValueError, match="share no memory"):
            ops["gather_rows"](given, offsets, source, offsets, out)
