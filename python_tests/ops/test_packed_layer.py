"""The layer on the vector kernels against float64: sizes, bits that do not depend on the batch, and wrong arguments."""

from __future__ import annotations

import ast
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.backends import backend_params
from support.capability import run_tests_of, with_fewer_instructions
from support.models import run_python
from support.packed_layers import ACTIVATIONS, packed_layer

from earlyexit_kernels.backends import extension_function
from earlyexit_kernels.cpu import panels
from earlyexit_kernels.cpu.panels import EncoderWeights, PanelLayout, native_layouts, pack_weights

EPS = (1e-5, 1e-3)
#: H, inner width, heads: multiples of the kernels' panels, none of them, odd head sizes, an inner width of 1.
SIZES = ((64, 128, 4), (96, 160, 3), (20, 33, 2), (9, 1, 3), (7, 5, 1), (40, 800, 5))
#: Tokens of each row; blocks of 1024 tokens end between and after them.
LENGTHS = ((1,), (33,), (3, 17, 1, 40), (130, 7), (0, 4, 0), (700, 300, 100), (1100, 2))
#: Dtype of the stored weights -> largest error, of outputs around 1.
STORED = {torch.float32: 8e-6, torch.float16: 8e-6, torch.bfloat16: 0.1, torch.int8: 0.15}
#: The same without int8 on a processor with AVX-512 but without its instructions for bytes.
NATIVE = [dtype for dtype in STORED if dtype in native_layouts()]


@pytest.fixture(params=backend_params(("torch", "cpp")))
def backend(request) -> str:
    if request.param == "cpp" and not native_layouts():
        pytest.skip("the processor has no vector kernels")
    return request.param


@pytest.fixture(params=["cpp"])
def kernels(request) -> str:
    if not native_layouts():
        pytest.skip("the processor has no vector kernels")
    return request.param


def weights(width, inner, seed=0) -> EncoderWeights:
    g = torch.Generator().manual_seed(seed)
    shapes = {"qkv": (3 * width, width), "out": (width, width), "norm1": (width,)}
    shapes |= {"inner": (inner, width), "outer": (width, inner), "norm2": (width,)}
    return EncoderWeights(
        *(torch.randn(s, generator=g) * s[-1] ** -0.5 for shape in shapes.values() for s in (shape, shape[:1]))
    )


def tokens(lengths, width, seed=1) -> tuple[torch.Tensor, torch.Tensor]:
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    return torch.randn(int(offsets[-1]), width, generator=torch.Generator().manual_seed(seed)), offsets


def rounded(weight, stored) -> torch.Tensor:
    """Return a weight as it is stored; in int8 each output has a scale."""
    if stored != torch.int8:
        return weight.to(stored)
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return (weight / scale).round() * scale


def expected(x, w, lengths, heads, activation, stored) -> torch.Tensor:
    """Return the layer in float64, row by row, of weights that were rounded to the dtype in which they are stored."""
    names = [f"{name}_weight" for name in ("qkv", "out", "inner", "outer")]
    linears = {name: rounded(getattr(w, name), stored) for name in names}
    w = EncoderWeights(*(x.double() for x in w._replace(**linears)))
    width, outputs = x.shape[1], []
    for row in x.double().split(lengths):
        q, k, v = F.linear(row, w.qkv_weight, w.qkv_bias).view(len(row), 3, heads, width // heads).permute(1, 2, 0, 3)
        scores = (q @ k.transpose(1, 2) / (width // heads) ** 0.5).softmax(dim=-1)
        context = (scores @ v).transpose(0, 1).reshape(len(row), width)
        y = F.layer_norm(
            row + F.linear(context, w.out_weight, w.out_bias), (width,), w.norm1_weight, w.norm1_bias, EPS[0]
        )
        z = y + F.linear(
            ACTIVATIONS[activation](F.linear(y, w.inner_weight, w.inner_bias)), w.outer_weight, w.outer_bias
        )
        outputs.append(F.layer_norm(z, (width,), w.norm2_weight, w.norm2_bias, EPS[1]))
    return torch.cat(outputs)


@pytest.mark.sample(5)
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("size", SIZES)
def test_equals_float64(size, stored, backend):
    if backend == "cpp" and stored not in NATIVE:
        pytest.skip("the processor has no instructions for this type")
    width, inner, heads = size
    w = weights(width, inner)
    packed = pack_weights(w, stored)
    for lengths in LENGTHS:
        x, offsets = tokens(lengths, width)
        for activation in ACTIVATIONS:
            got = packed_layer(x, offsets, packed=packed, eps=EPS, heads=heads, activation=activation, backend=backend)
            want = expected(x, w, lengths, heads, activation, stored)
            torch.testing.assert_close(got.double(), want, atol=STORED[stored], rtol=1e-5)


@pytest.mark.parametrize("width", [48, 51])
@pytest.mark.parametrize("stored", NATIVE)
def test_every_small_number_of_tokens(stored, width, kernels):
    w = weights(width, 101)
    packed = pack_weights(w, stored)
    for count in range(1, 71):
        x, offsets = tokens((count,), width, seed=count)
        got = packed_layer(x, offsets, packed=packed, eps=EPS, heads=3, backend=kernels)
        torch.testing.assert_close(
            got.double(), expected(x, w, (count,), 3, "gelu", stored), atol=STORED[stored], rtol=1e-5
        )


@pytest.mark.skipif(torch.int8 not in NATIVE, reason="the processor has no instructions for this type")
@pytest.mark.parametrize("size", SIZES)
def test_int8_equals_the_reference(size, kernels):
    """Which rounds the inputs of the products too; a value between two bytes may be rounded either way."""
    width, inner, heads = size
    packed = pack_weights(weights(width, inner), torch.int8)
    x, offsets = tokens((33, 1, 6), width)
    x[2], x[7] = 0.0, 1e-30
    x[3] *= 1e-38  # the inverse of its scale is not finite
    got, want = (packed_layer(x, offsets, packed=packed, eps=EPS, heads=heads, backend=b) for b in (kernels, "torch"))
    torch.testing.assert_close(got, want, atol=2e-2, rtol=0)
    assert (got - want).abs().mean() < 1e-3


@pytest.mark.skipif(torch.int8 not in NATIVE, reason="the processor has no instructions for this type")
@pytest.mark.parametrize("width", [130, 131])
def test_int8_loses_nothing_of_values_that_are_bytes(width, kernels):
    """The norm makes each y a row of ones; sums are whole numbers up to 127, one of them of the largest bytes alone."""
    g = torch.Generator().manual_seed(0)
    signs = {"inner": (77, width), "outer": (width, 77)}
    inner, outer = (torch.randint(0, 2, shape, generator=g) * 2.0 - 1 for shape in signs.values())
    inner[5], inner[6] = 1.0, -1.0
    bias = torch.zeros(77)
    bias[5] = 127 - width
    w = weights(width, 77)._replace(norm1_weight=torch.zeros(width), norm1_bias=torch.ones(width))
    w = w._replace(inner_weight=inner, inner_bias=bias, outer_weight=outer, outer_bias=torch.zeros(width))
    for count in range(1, 30):
        x, offsets = tokens((count,), width)
        packed = pack_weights(w, torch.int8)
        got = packed_layer(x, offsets, packed=packed, eps=EPS, heads=1, activation="relu", backend=kernels)
        want = expected(x, w, (count,), 1, "relu", torch.float32)
        torch.testing.assert_close(got.double(), want, atol=5e-6, rtol=1e-5)


def one_vector_layers() -> dict[str, torch.Tensor]:
    """Return layers by the kernels, as integers, in which no sum is over more than a vector of AVX2 but in products."""
    found = {}
    for stored in (torch.float32, torch.float16, torch.int8):
        for width, inner in ((7, 301), (5, 33), (1, 900)):
            x, offsets = tokens((1, 8, 3, 5), width)
            packed = pack_weights(weights(width, inner), stored)
            got = packed_layer(x, offsets, packed=packed, eps=EPS, heads=1, backend="cpp")
            found[f"{stored} {width} {inner}"] = got.view(torch.int32).tolist()
    return found


@pytest.mark.thorough
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="compares with the AVX-512 kernels")
@pytest.mark.skipif(torch.int8 not in NATIVE, reason="the processor has no instructions for this type")
def test_products_have_the_same_bits_with_avx2_as_with_avx512(kernels):
    """Other sums, over more values than a vector of AVX2 has, are added in another order."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_packed_layer as t; print(t.one_vector_layers())"
    got = run_python(code, str(Path(__file__).parent), timeout=300, ATEN_CPU_CAPABILITY="avx2")
    assert ast.literal_eval(got) == one_vector_layers()


@pytest.mark.parametrize("stored", NATIVE)
def test_a_row_has_the_same_bits_in_every_batch(stored, kernels):
    """Alone, with others before and after it, and in another block; at 1, 2 and 3 threads."""
    width, lengths = 96, (5, 64, 1, 33, 900, 200, 14, 512)
    packed = pack_weights(weights(width, 200), stored)
    rows = tokens(lengths, width)[0].split(lengths)

    def run(chosen):
        batch = torch.cat([rows[i] for i in chosen])
        ends = torch.tensor([0, *(lengths[i] for i in chosen)]).cumsum(0).int()
        out = packed_layer(batch, ends, packed=packed, eps=EPS, heads=4, backend=kernels)
        return dict(zip(chosen, out.split([lengths[i] for i in chosen]), strict=True))

    alone = {i: run([i])[i] for i in range(len(lengths))}
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for chosen in (range(8), [7, 3, 0], [4, 1, 2, 6], [6, 5, 4, 3, 2, 1, 0, 7]):
                for i, got in run(list(chosen)).items():
                    assert torch.equal(got, alone[i]), f"row {i} of {list(chosen)} at {threads} threads"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("width", [96, 21])
def test_a_value_that_is_not_finite_stays_in_its_row(width, value, kernels):
    lengths = (3, 20, 1, 40)
    for stored in NATIVE:
        packed = pack_weights(weights(width, 33), stored)
        x, offsets = tokens(lengths, width)
        clean = packed_layer(x, offsets, packed=packed, eps=EPS, heads=3, backend=kernels).split(lengths)
        poisoned = x.clone()
        poisoned[3 + 7, width - 1] = value
        got = packed_layer(poisoned, offsets, packed=packed, eps=EPS, heads=3, backend=kernels).split(lengths)
        assert all(torch.equal(got[i], clean[i]) for i in (0, 2, 3))
        if value != 3e38:  # which is large, but a number
            assert not torch.isfinite(got[1]).all()


@pytest.mark.parametrize("stored", NATIVE)
def test_inputs_need_no_alignment(stored, kernels):
    packed = pack_weights(weights(64, 100), stored)
    x, offsets = tokens((5, 9), 64)
    room = torch.empty(x.numel() + 1)
    shifted = room[1:].view_as(x).copy_(x)
    ends = torch.cat([offsets[:1], offsets])[1:]
    want = packed_layer(x, offsets, packed=packed, eps=EPS, heads=4, backend=kernels)
    assert torch.equal(packed_layer(shifted, ends, packed=packed, eps=EPS, heads=4, backend=kernels), want)


def test_no_tokens(backend):
    packed = pack_weights(weights(8, 4))
    for offsets in ([0], [0, 0]):
        x = torch.empty(0, 8)
        got = packed_layer(
            x, torch.tensor(offsets, dtype=torch.int32), packed=packed, eps=EPS, heads=2, backend=backend
        )
        assert got.shape == (0, 8)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_over_their_range(activation, kernels):
    """Identity weights put the activation of known values into the output; none loses more than float32 rounding."""
    values = torch.linspace(-12, 12, 4096)
    width = 64
    eye, zeros, ones = torch.eye(width), torch.zeros(width), torch.ones(width)
    w = EncoderWeights(
        eye.repeat(3, 1), zeros.repeat(3), 0 * eye, zeros, ones, zeros, eye, zeros, eye, zeros, ones, zeros
    )
    x = values.view(-1, width)
    offsets = torch.arange(len(x) + 1, dtype=torch.int32)
    got = packed_layer(x, offsets, packed=pack_weights(w), eps=EPS, heads=1, activation=activation, backend=kernels)
    torch.testing.assert_close(
        got.double(), expected(x, w, [1] * len(x), 1, activation, torch.float32), atol=3e-6, rtol=1e-5
    )


def test_error_is_at_most_twice_that_of_the_plain_layer(kernels):
    """In float32, against float64, at the sizes of BERT-base."""
    width, inner, heads, lengths = 768, 3072, 12, (128, 32)
    w = weights(width, inner)
    x, offsets = tokens(lengths, width)
    want = expected(x, w, lengths, heads, "gelu", torch.float32)
    errors = [
        (packed_layer(x, offsets, packed=pack_weights(w), eps=EPS, heads=heads, backend=b).double() - want).norm()
        for b in (kernels, "torch")
    ]
    assert errors[0] <= 2 * errors[1]


X, OFFSETS = tokens((2, 3), 8)
PACKED = pack_weights(weights(8, 12))
#: Case -> the changed arguments, and words of the message.
REFUSED = {
    "dtype": ({"x": X.double()}, r"x to be float32 \[\*, 8\], got float64 \[5, 8\]"),
    "width": ({"x": torch.randn(5, 4)}, r"x to be float32 \[\*, 8\], got float32 \[5, 4\]"),
    "heads": ({"heads": 3}, "heads to divide 8, got 3"),
    "activation": ({"activation": "silu"}, "activation to be one of 'none', 'gelu', .* got 'silu'"),
    "eps": ({"eps": (1e-5,)}, "2 eps, got 4, 4, 4 and 1"),
    "weights": ({"packed": PACKED._replace(weights=PACKED.weights[:3])}, "2 eps, got 3, 4, 4 and 2"),
    "unpacked": (
        {"packed": PACKED._replace(weights=[torch.zeros(8, 8)] * 4)},
        r"qkv to be .* float32 \[8,",
    ),
    "biases": ({"packed": PACKED._replace(biases=[torch.zeros(1, 3)] * 4)}, "qkv to be float32 .* got float32 .1, 3"),
    "norms": ({"packed": PACKED._replace(norms=[*PACKED.norms[:3], torch.zeros(3)])}, r"norms to be float32 \[8\]"),
    "decreasing": (
        {"offsets": torch.tensor([0, 3, 2, 5], dtype=torch.int32)},
        "to decrease, got 3 then 2",
    ),
    "none": ({"offsets": OFFSETS[:0]}, "an empty tensor"),
    "short": ({"offsets": OFFSETS[:-1]}, "offsets from 0 to 5, got 0 to 2; every token must belong to a row"),
    "late": ({"offsets": OFFSETS[1:]}, "offsets from 0 to 5, got 2 to 5; every token must belong to a row"),
    "beyond": ({"offsets": OFFSETS + OFFSETS}, "offsets to end within the 5 tokens given, got 10"),
    "int64": ({"offsets": OFFSETS.long()}, "offsets to be int32"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_invalid_arguments_are_refused(name, kernels):
    call = {"x": X, "offsets": OFFSETS, "packed": PACKED, "eps": EPS, "heads": 2, "backend": kernels}
    packed_layer(**call)
    changed, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"^PackedLayer: expected .*{message}"):
        packed_layer(**call | changed)


def test_tokens_have_any_shape_and_strides(kernels):
    call = {"offsets": OFFSETS, "packed": PACKED, "eps": EPS, "heads": 2, "backend": kernels}
    want = packed_layer(X, **call)
    assert torch.equal(packed_layer(X[None], **call), want[None])
    assert torch.equal(packed_layer(X.t().contiguous().t(), **call), want)


def test_threads_share_a_layer(kernels):
    layer = extension_function("PackedLayer")(*PACKED, list(EPS), 2, "gelu")
    batches = [tokens((n, 2 * n), 8, seed=n) for n in range(1, 40)]
    expected = [layer(*batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            got = pool.map(lambda batch: layer(*batch), batches)
            assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


def test_weights_of_another_dtype_are_refused():
    for w, dtype in (
        (weights(8, 4), torch.float64),
        (EncoderWeights(*(x.half() for x in weights(8, 4))), torch.float16),
    ):
        with pytest.raises(ValueError, match="expected float32 weights, stored in one of"):
            pack_weights(w, dtype)


@pytest.mark.skipif(torch.int8 not in NATIVE, reason="the processor has no instructions for this type")
def test_sums_of_bytes_that_may_overflow_are_refused(kernels):
    w, (x, offsets) = weights(1, (1 << 17) + 1), tokens((2,), 1)
    with pytest.raises(ValueError, match=r"at most 131072 inputs of outer for weights in int8, got 13107[46]"):
        packed_layer(x, offsets, packed=pack_weights(w, torch.int8), eps=EPS, heads=1, backend=kernels)


def test_weights_of_another_layout_are_refused(kernels, monkeypatch):
    """As of a machine with other kernels; the reference reads every layout."""
    monkeypatch.setattr(panels, "native_layouts", lambda: {torch.float32: PanelLayout(5, 3)})
    packed = pack_weights(weights(8, 12))
    call = {"packed": packed, "eps": EPS, "heads": 2}
    want = packed_layer(X, OFFSETS, **call | {"packed": PACKED}, backend=kernels)
    torch.testing.assert_close(packed_layer(X, OFFSETS, **call, backend="torch"), want)
    with pytest.raises(ValueError, match="expected qkv to be float32"):
        packed_layer(X, OFFSETS, **call, backend=kernels)


@pytest.mark.thorough
@with_fewer_instructions
def test_other_kernels_of_this_processor(capability, kernels):
    """The tests of this file, with the kernels that ATEN_CPU_CAPABILITY leaves."""
    printed = run_tests_of(__file__, capability)
    assert ("has no vector kernels" in printed) == (capability == "default"), printed[-300:]
    if capability == "avx2":
        assert "no instructions for this type" not in printed, printed[-300:]


@pytest.mark.parametrize("stored", NATIVE)
def test_a_large_layer_has_its_weights_side_by_side(stored, kernels):
    """The weights of a layer of more than a huge page are parts of one buffer, and those of a small layer are not."""
    heads, (width, inner) = 4, (512, 2048)
    w = weights(width, inner)
    packed = pack_weights(w, stored)
    begins = [x.data_ptr() for x in packed.weights]
    ends = [x.data_ptr() + x.nbytes for x in packed.weights]
    assert begins[0] % 64 == 0 and all(0 <= b - e < 64 for b, e in zip(begins[1:], ends[:-1], strict=True))
    x, offsets = tokens((3, 17), width)
    got = packed_layer(x, offsets, packed=packed, eps=EPS, heads=heads, backend=kernels)
    torch.testing.assert_close(
        got.double(), expected(x, w, (3, 17), heads, "gelu", stored), atol=4 * STORED[stored], rtol=0
    )
    assert len({x.untyped_storage().data_ptr() for x in pack_weights(weights(64, 128), stored).weights}) == 4
