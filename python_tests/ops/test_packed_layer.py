"""The layer on the vector kernels against float64: sizes, bits that do not depend on the batch, and wrong arguments."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.models import run_python
from torch import Tensor

from earlyexit_kernels.backends import extension_function
from earlyexit_kernels.cpu import panels
from earlyexit_kernels.cpu.panels import EncoderWeights, PackedWeights, PanelLayout, native_layouts, pack_weights

ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu}
EPS = (1e-5, 1e-3)
#: H, inner width, heads: multiples of the kernels' panels, none of them, odd head sizes, an inner width of 1.
SIZES = ((64, 128, 4), (96, 160, 3), (20, 33, 2), (9, 1, 3), (7, 5, 1), (40, 800, 5))
#: Tokens of each row; blocks of 1024 tokens end between and after them.
LENGTHS = ((1,), (33,), (3, 17, 1, 40), (130, 7), (0, 4, 0), (700, 300, 100), (1100, 2))
#: Dtype of the stored weights -> largest error, of outputs around 1.
STORED = {torch.float32: 8e-6, torch.float16: 8e-6, torch.bfloat16: 0.1, torch.int8: 0.15}
#: The same without int8 on a processor with AVX-512 but without its instructions for bytes.
NATIVE = [dtype for dtype in STORED if dtype in native_layouts()]

pytestmark = pytest.mark.skipif(not native_layouts(), reason="the processor has no vector kernels")
every_type = pytest.mark.parametrize("stored", NATIVE)
with_bytes = pytest.mark.skipif(torch.int8 not in NATIVE, reason="the processor has no instructions for this type")


def weights(width, inner, seed=0) -> EncoderWeights:
    g = torch.Generator().manual_seed(seed)
    shapes = {"qkv": (3 * width, width), "out": (width, width), "norm1": (width,)}
    shapes |= {"inner": (inner, width), "outer": (width, inner), "norm2": (width,)}
    return EncoderWeights(
        *(torch.randn(s, generator=g) * s[-1] ** -0.5 for shape in shapes.values() for s in (shape, shape[:1]))
    )


def offsets_of(lengths) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def tokens(lengths, width, seed=1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(sum(lengths), width, generator=g), offsets_of(lengths)


def layer(
    x: Tensor, offsets: Tensor, packed: PackedWeights, heads: int, *, eps: Sequence[float] = EPS, activation="gelu"
) -> Tensor:
    make: Any = extension_function("PackedLayer")
    return make(*packed, list(eps), heads, activation)(x, offsets)


def as_bytes(x) -> Tensor:
    """Return each row rounded to whole multiples of a 127th of its largest value."""
    scale = x.abs().amax(dim=1, keepdim=True) / 127
    return (x / scale.where(scale != 0, 1.0)).round() * scale


def expected(
    x, w, lengths, heads, *, activation="gelu", stored=torch.float32, dtype=torch.float64, rounds_inputs=False
) -> Tensor:
    """Return the layer, row by row, of weights that were rounded to the dtype in which they are stored.

    Args:
        rounds_inputs: of the four products, as the kernels do for weights in int8.
    """
    names = [f"{name}_weight" for name in ("qkv", "out", "inner", "outer")]
    rounded = {name: getattr(w, name) for name in names}
    rounded = {name: as_bytes(x) if stored == torch.int8 else x.to(stored) for name, x in rounded.items()}
    w = EncoderWeights(*(x.to(dtype) for x in w._replace(**rounded)))
    width, outputs = x.shape[1], []

    def linear(x, weight, bias):
        return F.linear(as_bytes(x) if rounds_inputs else x, weight, bias)

    for row in x.to(dtype).split(lengths):
        q, k, v = linear(row, w.qkv_weight, w.qkv_bias).view(len(row), 3, heads, width // heads).permute(1, 2, 0, 3)
        scores = (q @ k.transpose(1, 2) / (width // heads) ** 0.5).softmax(dim=-1)
        context = (scores @ v).transpose(0, 1).reshape(len(row), width)
        y = row + linear(context, w.out_weight, w.out_bias)
        y = F.layer_norm(y, (width,), w.norm1_weight, w.norm1_bias, EPS[0])
        z = ACTIVATIONS[activation](linear(y, w.inner_weight, w.inner_bias))
        z = y + linear(z, w.outer_weight, w.outer_bias)
        outputs.append(F.layer_norm(z, (width,), w.norm2_weight, w.norm2_bias, EPS[1]))
    return torch.cat(outputs)


def check(w, packed, lengths, heads, atol, *, seed=1, activation="gelu", stored=torch.float32) -> None:
    """Compare the layer of random tokens with float64."""
    x, offsets = tokens(lengths, packed.norms[0].numel(), seed)
    got = layer(x, offsets, packed, heads, activation=activation)
    want = expected(x, w, lengths, heads, activation=activation, stored=stored)
    torch.testing.assert_close(got.double(), want, atol=atol, rtol=1e-5)


@every_type
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_value_inside_that_is_not_a_number_reaches_the_output(activation, stored):
    """That of one inner unit, which an activation or a rounding to bytes could lose."""
    w = weights(64, 128)
    w.inner_bias[3] = torch.nan
    x, offsets = tokens((3, 5), 64)
    assert layer(x, offsets, pack_weights(w, stored), 4, activation=activation).isnan().all()


@pytest.mark.sample(5)
@every_type
@pytest.mark.parametrize("size", SIZES)
def test_equals_float64(size, stored):
    width, inner, heads = size
    w = weights(width, inner)
    packed = pack_weights(w, stored)
    for lengths in LENGTHS:
        for activation in ACTIVATIONS:
            check(w, packed, lengths, heads, STORED[stored], activation=activation, stored=stored)


@pytest.mark.parametrize("width", [48, 51])
@every_type
def test_every_small_number_of_tokens(stored, width):
    w = weights(width, 101)
    packed = pack_weights(w, stored)
    for count in range(1, 71):
        check(w, packed, (count,), 3, STORED[stored], seed=count, stored=stored)


@with_bytes
@pytest.mark.parametrize("size", SIZES)
def test_int8_rounds_the_inputs_of_the_products(size):
    """A value between two bytes may be rounded either way."""
    width, inner, heads = size
    w, (x, offsets) = weights(width, inner), tokens((33, 1, 6), width)
    x[2], x[7] = 0.0, 1e-30
    x[3] *= 1e-38  # the inverse of its scale is not finite
    got = layer(x, offsets, pack_weights(w, torch.int8), heads)
    want = expected(x, w, (33, 1, 6), heads, stored=torch.int8, dtype=torch.float32, rounds_inputs=True)
    torch.testing.assert_close(got, want, atol=2e-2, rtol=0)
    assert (got - want).abs().mean() < 1e-3


@with_bytes
@pytest.mark.parametrize("width", [130, 131])
def test_int8_loses_nothing_of_values_that_are_bytes(width):
    """The norm makes each y a row of ones; sums are whole numbers up to 127, one of them of the largest bytes alone."""
    g = torch.Generator().manual_seed(0)
    signs = {"inner": (77, width), "outer": (width, 77)}
    inner, outer = (torch.randint(0, 2, shape, generator=g) * 2.0 - 1 for shape in signs.values())
    inner[5], inner[6] = 1.0, -1.0
    bias = torch.zeros(77)
    bias[5] = 127 - width
    w = weights(width, 77)._replace(norm1_weight=torch.zeros(width), norm1_bias=torch.ones(width))
    w = w._replace(inner_weight=inner, inner_bias=bias, outer_weight=outer, outer_bias=torch.zeros(width))
    packed = pack_weights(w, torch.int8)
    for count in range(1, 30):
        check(w, packed, (count,), 1, 5e-6, activation="relu")


def one_vector_layers() -> dict[str, Tensor]:
    """Return layers, as integers, in which no sum is over more than a vector of AVX2 but in products."""
    sizes = ((7, 301), (5, 33), (1, 900))
    return {
        f"{stored} {width} {inner}": layer(
            *tokens((1, 8, 3, 5), width), pack_weights(weights(width, inner), stored), heads=1
        )
        .view(torch.int32)
        .tolist()
        for stored in (torch.float32, torch.float16, torch.int8)
        for width, inner in sizes
    }


@pytest.mark.thorough
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="compares with the AVX-512 kernels")
@with_bytes
def test_products_have_the_same_bits_with_avx2_as_with_avx512():
    """Other sums, over more values than a vector of AVX2 has, are added in another order."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_packed_layer as t; print(t.one_vector_layers())"
    got = run_python(code, str(Path(__file__).parent), timeout=300, ATEN_CPU_CAPABILITY="avx2")
    assert ast.literal_eval(got) == one_vector_layers()


@every_type
def test_a_row_has_the_same_bits_in_every_batch(stored, thread_counts):
    """Alone, with others before and after it, and in another block; at 1, 2 and 3 threads."""
    width, lengths = 96, (5, 64, 1, 33, 900, 200, 14, 512)
    packed = pack_weights(weights(width, 200), stored)
    rows = tokens(lengths, width)[0].split(lengths)

    def run(chosen):
        own = [lengths[i] for i in chosen]
        out = layer(torch.cat([rows[i] for i in chosen]), offsets_of(own), packed, 4)
        return dict(zip(chosen, out.split(own), strict=True))

    alone = {i: run([i])[i] for i in range(len(lengths))}
    for threads in thread_counts:
        for chosen in (range(8), [7, 3, 0], [4, 1, 2, 6], [6, 5, 4, 3, 2, 1, 0, 7]):
            for i, got in run(list(chosen)).items():
                assert torch.equal(got, alone[i]), f"row {i} of {list(chosen)} at {threads} threads"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("width", [96, 21])
def test_a_value_that_is_not_finite_stays_in_its_row(width, value):
    lengths = (3, 20, 1, 40)
    for stored in NATIVE:
        packed = pack_weights(weights(width, 33), stored)
        x, offsets = tokens(lengths, width)
        clean = layer(x, offsets, packed, 3).split(lengths)
        x[3 + 7, width - 1] = value
        got = layer(x, offsets, packed, 3).split(lengths)
        assert all(torch.equal(got[i], clean[i]) for i in (0, 2, 3))
        if value != 3e38:  # which is large, but a number
            assert not torch.isfinite(got[1]).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_over_their_range(activation):
    """Identity weights put the activation of known values into the output; none loses more than float32 rounding."""
    values = torch.linspace(-12, 12, 4096)
    width = 64
    eye, zeros, ones = torch.eye(width), torch.zeros(width), torch.ones(width)
    w = EncoderWeights(
        eye.repeat(3, 1), zeros.repeat(3), 0 * eye, zeros, ones, zeros, eye, zeros, eye, zeros, ones, zeros
    )
    x = values.view(-1, width)
    got = layer(x, offsets_of([1] * len(x)), pack_weights(w), 1, activation=activation)
    want = expected(x, w, [1] * len(x), 1, activation=activation)
    torch.testing.assert_close(got.double(), want, atol=3e-6, rtol=1e-5)


def test_error_is_at_most_twice_that_of_the_plain_layer():
    """In float32, against float64, at the sizes of BERT-base."""
    width, inner, heads, lengths = 768, 3072, 12, (128, 32)
    w, (x, offsets) = weights(width, inner), tokens(lengths, width)
    want = expected(x, w, lengths, heads)
    plain = expected(x, w, lengths, heads, dtype=torch.float32)
    got = layer(x, offsets, pack_weights(w), heads)
    assert (got.double() - want).norm() <= 2 * (plain.double() - want).norm()


X, OFFSETS = tokens((2, 3), 8)
PACKED = pack_weights(weights(8, 12))
ENDS = "offsets from 0 to 5, got {}; every token must belong to a row"
#: The changed arguments, and words of the message.
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"x": X.double()}, r"x to be float32 \[\*, 8\], got float64 \[5, 8\]"),
    ({"x": torch.randn(5, 4)}, r"x to be float32 \[\*, 8\], got float32 \[5, 4\]"),
    ({"heads": 3}, "heads to divide 8, got 3"),
    ({"activation": "silu"}, "activation to be one of 'none', 'gelu', .* got 'silu'"),
    ({"eps": (1e-5,)}, "2 eps, got 4, 4, 4 and 1"),
    ({"packed": PACKED._replace(weights=PACKED.weights[:3])}, "2 eps, got 3, 4, 4 and 2"),
    ({"packed": PACKED._replace(weights=[torch.zeros(8, 8)] * 4)}, r"qkv to be .* float32 \[8,"),
    ({"packed": PACKED._replace(biases=[torch.zeros(1, 3)] * 4)}, "qkv to be float32 .* got float32 .1, 3"),
    ({"packed": PACKED._replace(norms=[*PACKED.norms[:3], torch.zeros(3)])}, r"norms to be float32 \[8\]"),
    ({"offsets": torch.tensor([0, 3, 2, 5], dtype=torch.int32)}, "to decrease, got 3 then 2"),
    ({"offsets": OFFSETS[:0]}, "an empty tensor"),
    ({"offsets": OFFSETS[:-1]}, ENDS.format("0 to 2")),
    ({"offsets": OFFSETS[1:]}, ENDS.format("2 to 5")),
    ({"offsets": OFFSETS + OFFSETS}, "offsets to end within the 5 tokens given, got 10"),
    ({"offsets": OFFSETS.long()}, "offsets to be int32"),
]


@pytest.mark.parametrize(("changed", "message"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_invalid_arguments_are_refused(changed, message):
    call = {"x": X, "offsets": OFFSETS, "packed": PACKED, "heads": 2}
    layer(**call)
    with pytest.raises(ValueError, match=f"^PackedLayer: expected .*{message}"):
        layer(**call | changed)


@every_type
def test_tokens_have_any_shape_strides_and_alignment(stored):
    packed, (x, offsets) = pack_weights(weights(64, 100), stored), tokens((5, 9), 64)
    want = layer(x, offsets, packed, 4)
    shifted = torch.empty(x.numel() + 1)[1:].view_as(x).copy_(x)
    for given in (shifted, x.t().contiguous().t()):
        assert torch.equal(layer(given, torch.cat([offsets[:1], offsets])[1:], packed, 4), want)
    assert torch.equal(layer(x[None], offsets, packed, 4), want[None])
    for rows in ([], [0]):
        assert layer(x[:0], offsets_of(rows), packed, 4).shape == (0, 64)


def test_threads_share_a_layer():
    shared = extension_function("PackedLayer")(*PACKED, list(EPS), 2, "gelu")
    batches = [tokens((n, 2 * n), 8, seed=n) for n in range(1, 40)]
    want = [shared(*batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            got = pool.map(lambda batch: shared(*batch), batches)
            assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_weights_of_another_dtype_are_refused():
    half = EncoderWeights(*(x.half() for x in weights(8, 4)))
    for w, dtype in ((weights(8, 4), torch.float64), (half, torch.float16)):
        with pytest.raises(ValueError, match="expected float32 weights, stored in one of"):
            pack_weights(w, dtype)


@with_bytes
def test_sums_of_bytes_that_may_overflow_are_refused():
    packed = pack_weights(weights(1, (1 << 17) + 1), torch.int8)
    with pytest.raises(ValueError, match=r"at most 131072 inputs of outer for weights in int8, got 13107[46]"):
        layer(*tokens((2,), 1), packed, 1)


def test_weights_of_another_layout_are_refused(monkeypatch):
    """As of a machine with other kernels."""
    monkeypatch.setattr(panels, "native_layouts", lambda: {torch.float32: PanelLayout(5, 3)})
    with pytest.raises(ValueError, match="expected qkv to be float32"):
        layer(X, OFFSETS, pack_weights(weights(8, 12)), 2)


@every_type
def test_a_large_layer_has_its_weights_side_by_side(stored):
    """The weights of a layer of more than a huge page are parts of one buffer, and those of a small layer are not."""
    w = weights(512, 2048)
    packed = pack_weights(w, stored)
    begins = [x.data_ptr() for x in packed.weights]
    ends = [x.data_ptr() + x.nbytes for x in packed.weights]
    assert begins[0] % 64 == 0 and all(0 <= b - e < 64 for b, e in zip(begins[1:], ends[:-1], strict=True))
    check(w, packed, (3, 17), 4, 4 * STORED[stored], stored=stored)
    assert len({x.untyped_storage().data_ptr() for x in pack_weights(weights(64, 128), stored).weights}) == 4
