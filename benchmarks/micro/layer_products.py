"""Which products a fused layer is best made of, by its tokens: the numbers behind `layers.PRODUCTS`.

One encoder layer of BERT's form on T packed tokens: the family's own, the fused one with oneDNN's products, the
activation after them or within, and with torch's own; all of one T take turns.
Run with ``python -m benchmarks.run --suite layer_products``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

import earlyexit_kernels as ee
from earlyexit_kernels.backends import available_backends
from earlyexit_kernels.engine.fused_layers import FusedLayer, LayerWeights, Products, why_not_onednn
from earlyexit_kernels.engine.packing import pack, plan_attention
from earlyexit_kernels.tuning.timing import interleave, paired_ratio, quantiles

SUITE = "layer_products"
BASELINE = "family"
WIDTHS = (384, 768)
#: Rows of 16 tokens, the length of a short sentence.
ROWS = (1, 2, 4, 8, 16, 32, 64)
LENGTH = 16
WAYS = {
    "oneDNN": Products(math.inf, with_activation=False),
    "oneDNN with the activation": Products(math.inf, with_activation=True),
    "torch": Products(0, with_activation=False),
}


def records(repeats: int) -> Iterator[dict[str, Any]]:
    """One record for each width, number of tokens and kind of product."""
    reason = why_not_onednn(torch.float32)
    if reason:
        yield {"suite": SUITE, "not_measured": reason}
        return
    with torch.inference_mode():
        for width in WIDTHS:
            yield from _records_of(width, repeats)


def _records_of(width: int, repeats: int) -> Iterator[dict[str, Any]]:
    config = BertConfig(
        hidden_size=width, num_attention_heads=width // 64, intermediate_size=4 * width, num_hidden_layers=1
    )
    model = ee.to_early_exit(BertForSequenceClassification(config).eval())
    own = model.adapter.layers(model.backbone)[0]
    backend = "torch" if available_backends("cpu")["cpp"] else "cpp"
    fused = FusedLayer.of(LayerWeights.of(own, model.adapter.names, config.num_attention_heads), backend)
    layers: dict[str, Any] = {
        BASELINE: own,
        **{f"fused, {name}": dataclasses.replace(fused, products=products) for name, products in WAYS.items()},
    }
    in_use = (
        f"up to {fused.products.packed_up_to} tokens oneDNN{' with the activation' * fused.products.with_activation}"
    )
    for rows in ROWS:
        batch = pack(torch.ones(rows, LENGTH, dtype=torch.long), None)
        plan, hidden = plan_attention(batch), torch.randn(1, rows * LENGTH, width)
        calls = {name: partial(layer, hidden, None, plan=plan) for name, layer in layers.items()}
        times = interleave(calls, repeats=repeats, progress=f"H {width}, T {rows * LENGTH}")
        for name in layers:
            median, p90 = quantiles(times[name], (0.5, 0.9))
            yield {
                "suite": SUITE,
                "case": name,
                "shape": f"H {width}, T {rows * LENGTH}",
                "dtype": "float32",
                "engine": "eager",
                "backend": backend,
                "baseline": BASELINE,
                "median_ms": round(median, 4),
                "p90_ms": round(p90, 4),
                **paired_ratio(times[name], times[BASELINE]).fields(),
                "goal": None,
                "cpu_capability": torch.backends.cpu.get_cpu_capability(),
                "in_use": in_use,
            }
