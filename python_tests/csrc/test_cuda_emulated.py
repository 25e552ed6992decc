"""The CUDA ops, emulated on the CPU thread by thread by `support.cuda_emulation`."""

from __future__ import annotations

import pytest
import torch
from ops import test_compact as compaction
from ops import test_exit_step as steps
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
def in_place_of_torch(ops, monkeypatch):
    """Let the public functions, and the tests of other files, call the emulated ops."""
    for name in OPS:
        monkeypatch.setitem(op_schemas._OPS[name], BACKEND, ops[name])


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
    return {
        "hidden": hidden,
        "weight": weight,
        "bias": torch.randn(classes, generator=g).to(dtype),
        "offsets": offsets,
        "pooling": pooling,
        "row_ids": torch.arange(len(lengths), dtype=torch.int32),
    }


def answers_at_last_layer(given, **changed) -> torch.Tensor:
    """Run the only layer, at which all rows leave, and return their logits."""
    rows, classes = len(given["row_ids"]), given["weight"].shape[0]
    held = memory(FullDepth(), rows, classes)
    exit_step(criterion=FullDepth(), layer=1, depth=1, backend=BACKEND, **{**given, **changed}, **held)
    return held["answers"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pooling", ["first", "mean"])
@pytest.mark.parametrize("width", [1, 3, 24, 768, 4104])
def test_widths_and_alignment(width, pooling, dtype):
    """4104 two-byte values are one pack more than a block has threads."""
    given = head(width, dtype, pooling)
    hidden, weight, bias = (given[name].double() for name in ("hidden", "weight", "bias"))
    rows = hidden.split(given["offsets"].diff().tolist())
    pooled = torch.stack([row.mean(dim=0) if pooling == "mean" else row[0] for row in rows])
    answers = answers_at_last_layer(given)
    torch.testing.assert_close(answers.double(), pooled @ weight.T + bias, rtol=1e-5, atol=1e-5)
    for changed in ({"hidden": head(width, dtype, pooling, shift=1)["hidden"]}, head(width, dtype, pooling, shift=1)):
        given["row_ids"] = torch.arange(4, dtype=torch.int32)
        assert torch.equal(answers_at_last_layer(given, **changed), answers), "bits depend on the alignment"


@pytest.mark.parametrize("classes", [6000, 6100])
def test_classes_beyond_shared_memory(classes):
    logits = torch.randn(3, classes)
    held = memory(FullDepth(), 3, classes)
    row_ids = torch.arange(3, dtype=torch.int32)
    entropy = torch.distributions.Categorical(logits=logits.double()).entropy()
    threshold = float(entropy.sort().values[1:].mean())
    counts = exit_step(
        criterion=Entropy(threshold=threshold),
        layer=1,
        depth=2,
        row_ids=row_ids,
        logits=logits,
        backend=BACKEND,
        **held,
    )
    left = entropy < threshold
    assert left.any() and counts.tolist() == [int((~left).sum())] * 2 + [0]
    assert torch.equal(row_ids < 0, left) and torch.equal(held["answers"][left], logits[left])


def test_classes_of_a_head_beyond_shared_memory():
    given = head(24, torch.float32, "first", classes=6000)
    first = given["hidden"][given["offsets"][:-1].long()]
    torch.testing.assert_close(answers_at_last_layer(given), first @ given["weight"].T + given["bias"])


def test_too_wide_a_hidden_state_is_refused(ops):
    width, held, criterion = 2**26 + 8, memory(FullDepth(), 1, 1), FullDepth()
    hidden, bias = torch.empty(1, width, dtype=torch.float16), torch.empty(1, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"exit_step_cpp: expected hidden of width at most 67108864, got 67108872"):
        ops["exit_step"](
            hidden, None, torch.empty_like(hidden), bias, None, None, torch.zeros(1).int(), *held.values(),
            criterion.exit_rule.name, [], "none", 1, 2,
        )  # fmt: skip


def test_large_batch():
    rows = 1500
    logits, held = torch.randn(rows, 2), memory(FullDepth(), rows, 2)
    logits[::7] = torch.nan
    row_ids, offsets = torch.arange(rows, dtype=torch.int32), torch.arange(0, 3 * rows + 1, 3, dtype=torch.int32)
    row_ids[3] = -1
    counts = exit_step(
        criterion=FullDepth(),
        layer=1,
        depth=2,
        row_ids=row_ids,
        logits=logits,
        offsets=offsets,
        backend=BACKEND,
        **held,
    )
    assert counts.tolist() == [rows - 1, 3 * rows - 3, len(logits[::7])]


@pytest.mark.parametrize("pattern", compaction.PATTERNS)
@pytest.mark.parametrize("b", [0, 1, 33, 1025, 8192, 8195])
def test_compact(b, pattern):
    compaction.test_compact(BACKEND, b, pattern)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 3, 17, 300, 768])
@pytest.mark.parametrize(("b", "pattern"), [(0, "none"), (1, "all"), (3, "alternating"), (33, "random")])
def test_gather_rows(b, pattern, width, dtype):
    compaction.test_gather_rows(BACKEND, b, pattern, width, dtype)


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


def test_hidden_of_width_zero_is_refused(ops):
    """The weight would be a null pointer, which stands for given logits in the kernel."""
    held, criterion = memory(FullDepth(), 2, 3), FullDepth()
    row_ids, empty = torch.arange(2).int(), (torch.zeros(2, 0), None, torch.zeros(3, 0), torch.zeros(3), None, None)
    with pytest.raises(ValueError, match=r"exit_step_cpp: expected hidden .* got \[2, 0\]"):
        ops["exit_step"](*empty, row_ids, *held.values(), criterion.exit_rule.name, [], "none", 1, 2)
