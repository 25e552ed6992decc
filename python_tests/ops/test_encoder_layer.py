"""encoder_layer against plain torch in float64, and its invalid arguments."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.backends import backend_params

from earlyexit_kernels.engine.attention_plan import plan_attention
from earlyexit_kernels.engine.packing import pack
from earlyexit_kernels.ops import EncoderWeights, encoder_layer

H, INNER, HEADS, EPS = 8, 12, 2, (1e-5, 1e-3)
LENGTHS = {"one length": (4, 4), "one bucket": (4, 2, 3), "two buckets": (3, 20, 1, 30)}
ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu}


@pytest.fixture(params=backend_params(("torch", "cpp")))
def backend(request) -> str:
    return request.param


def weights(dtype=torch.float32) -> EncoderWeights:
    g = torch.Generator().manual_seed(0)
    shapes = {"qkv": (3 * H, H), "out": (H, H), "norm1": (H,), "inner": (INNER, H), "outer": (H, INNER), "norm2": (H,)}
    tensors = [torch.randn(s, generator=g) * 0.5 for shape in shapes.values() for s in (shape, shape[:1])]
    return EncoderWeights(*(x.to(dtype) for x in tensors))


def plan_of(lengths) -> dict:
    """The arguments of the op for rows of these lengths."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    plan = plan_attention(pack(torch.zeros(mask.shape, dtype=torch.int64), mask))
    names = ("rows", "widths", "slots", "masks", "kept", "inverse")
    return dict(zip(names, plan.grouped().arguments, strict=True))


def expected(x, w, lengths, activation) -> torch.Tensor:
    """Return the expected output, computed one row at a time."""
    outputs = []
    for row in x.split(lengths):
        q, k, v = F.linear(row, w.qkv_weight, w.qkv_bias).view(len(row), 3, HEADS, -1).permute(1, 2, 0, 3)
        scores = (q @ k.transpose(1, 2) / (H // HEADS) ** 0.5).softmax(dim=-1)
        context = (scores @ v).transpose(0, 1).flatten(1)
        y = F.layer_norm(row + F.linear(context, w.out_weight, w.out_bias), (H,), w.norm1_weight, w.norm1_bias, EPS[0])
        z = ACTIVATIONS[activation](F.linear(y, w.inner_weight, w.inner_bias))
        z = y + F.linear(z, w.outer_weight, w.outer_bias)
        outputs.append(F.layer_norm(z, (H,), w.norm2_weight, w.norm2_bias, EPS[1]))
    return torch.cat(outputs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", LENGTHS)
def test_equals_plain_torch(name, activation, backend):
    lengths = LENGTHS[name]
    x = torch.randn(sum(lengths), H, generator=torch.Generator().manual_seed(1))
    got = encoder_layer(
        x, weights=weights(), eps=EPS, heads=HEADS, activation=activation, backend=backend, **plan_of(lengths)
    )
    want = expected(x.double(), weights(torch.float64), lengths, activation)
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=1e-4)


def call(**changed) -> dict:
    """Arguments of a valid call, with some changed."""
    given = {"x": torch.zeros(9, H), "weights": weights(), "eps": EPS, "heads": HEADS, **plan_of(LENGTHS["one bucket"])}
    return given | changed


SLOTS = plan_of(LENGTHS["one bucket"])["slots"][0]
#: Case -> the changed arguments, and words of the message.
REFUSED = {
    "activation": ({"activation": "silu"}, "expected activation to be one of .* got 'silu'"),
    "heads": ({"heads": 3}, "expected heads to divide 8, the width of x, got 3"),
    "eps": ({"eps": (1e-5,)}, "expected eps of 2 norms, got 1"),
    "weights": ({"weights": weights()[:-1]}, "expected 12 weights, and 4 packed or none, got 11 and 0"),
    "packed": ({"packed": weights()[:1]}, "expected 12 weights, and 4 packed or none, got 12 and 1"),
    "shape": ({"weights": weights()._replace(outer_bias=torch.zeros(H + 1))}, r"outer_bias of shape \[8\], got \[9\]"),
    "dtype": ({"weights": weights(torch.float64)}, "expected inner_weight to be torch.float32, got torch.float64"),
    "buckets": ({"masks": []}, r"of each bucket, got lengths \[1, 1, 1, 0, 1\]"),
    "slots": ({"slots": [None]}, "expected a bucket of 9 tokens without slots, got 3 rows of 4"),
    "slot": ({"slots": [SLOTS + 1]}, r"expected slots in \[0, 8\], got 1 to 9"),
    "kept": ({"kept": [None]}, "expected buckets of 9 kept slots, and inverse for several, got 12"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_invalid_arguments_are_refused(name, backend):
    changed, message = REFUSED[name]
    encoder_layer(**call(), backend=backend)
    with pytest.raises(ValueError, match=f"^encoder_layer: .*{message}"):
        encoder_layer(**call(**changed), backend=backend)
