"""A whole encoder layer of the ops against the family's own layer."""

from __future__ import annotations

import copy

import pytest
import torch
from support.backends import backend_params
from support.encoder_cases import Layout
from support.models import encoder_of, stock

from earlyexit_kernels import ops
from earlyexit_kernels.backbones import adapter_of
from earlyexit_kernels.engine import bert_weights

#: Activation of `LayerWeights` -> activation of the ops.
NAMES = {("gelu", "none"): "gelu", ("gelu", "tanh"): "gelu_tanh", ("relu", ""): "relu"}
LAYOUT = Layout((5, 2, 9, 1), left=(1,), rows=6, capacity=20, side=1)
CASES = [
    pytest.param(p.values[0], dtype, marks=p.marks, id=f"{p.values[0]}-{dtype}".replace("torch.", ""))
    for p in backend_params(("torch", "triton"))
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
    if (p.values[0], dtype) != ("triton", torch.bfloat16)
]


def run(layer: bert_weights.LayerWeights, hidden: torch.Tensor, layout: Layout, backend: str) -> None:
    """Run one layer in place in seven launches; intermediate buffers start as NaN."""
    offsets, width = layout.offsets, hidden.shape[1]
    qkv, context, mid, inner = (
        hidden.new_full((layout.capacity, n), torch.nan) for n in (3 * width, width, width, len(layer.inner.bias))
    )
    how = {"backend": backend}
    both = {"residual_absolute": True, "out_absolute": True, **how}
    first, second = layer.eps
    ops.rows_linear(hidden, *zip(*layer.projections, strict=True), offsets, qkv, absolute=True, **how)
    ops.rows_attention(qkv, offsets, layout.row_ids, layer.heads, max(layout.lengths), context, **how)
    # a row that has left still has tokens, with arbitrary values
    ops.rows_linear(context, *layer.attention_out, offsets, mid, **how)
    ops.rows_add_norm(mid, hidden, *layer.attention_norm, first, offsets, hidden, **both)
    activation = NAMES[layer.activation]
    ops.rows_linear(hidden, *layer.inner, offsets, inner, activation=activation, absolute=True, **how)
    ops.rows_linear(inner, *layer.outer, offsets, mid, **how)
    ops.rows_add_norm(mid, hidden, *layer.norm, second, offsets, hidden, **both)


@pytest.mark.parametrize(("backend", "dtype"), CASES)
@pytest.mark.parametrize("family", ["bert", "roberta", "albert"])
def test_layer_of_ops_is_as_close_to_float64_as_the_family_layer(family, backend, dtype):
    model = stock(family, dropout=0.0).to(dtype)
    adapter = adapter_of(family)
    (own,) = adapter.parts(adapter.layers(encoder_of(model))[0])
    exact = copy.deepcopy(own).double()
    weights = bert_weights.LayerWeights.of(own, adapter.names, model.config.num_attention_heads)
    values = [torch.randn(n, model.config.hidden_size).to(dtype) for n in LAYOUT.lengths]
    hidden = LAYOUT.buffer(values, model.config.hidden_size, dtype, absolute=True)
    with torch.no_grad():
        run(weights, hidden, LAYOUT, backend)
        want, theirs = (
            torch.cat([layer(values[i].to(kind)[None], None)[0].double() for i in LAYOUT.live])
            for layer, kind in ((exact, torch.float64), (own, dtype))
        )
    ours = torch.cat([hidden[LAYOUT.tokens(i, absolute=True)] for i in LAYOUT.live]).double()
    error, allowed = ((each - want).square().mean().sqrt() for each in (ours, theirs))
    assert 0 < error <= 1.25 * allowed
