"""Time of a fused layer by the library of its matrix products: the numbers behind `onednn.PRODUCTS`.

One encoder layer of BERT's form on T packed tokens: the family's own, and the fused one on the package's vector
kernels, with oneDNN's products, the activation after them or within, and with torch's.
Run with ``python -m benchmarks.run --suite layer_products``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

import earlyexit_kernels as ee
from benchmarks.harness import Implementation, PreparedCase, Record, Variant, ratio_fields, time_fields
from earlyexit_kernels.backbones.forms_bert import read_bert_layer
from earlyexit_kernels.backends import available_backends
from earlyexit_kernels.core.attention_plan import plan_attention
from earlyexit_kernels.core.packing import pack
from earlyexit_kernels.cpu.bert import OneDnnLayer
from earlyexit_kernels.cpu.kernels import PackedLayer, kernels_unsupported_reason
from earlyexit_kernels.cpu.onednn import Products, onednn_unsupported_reason, products_here

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


def records(repeats: int) -> Iterator[Record]:
    """Yield a record for each width, number of tokens and library."""
    reason = onednn_unsupported_reason(torch.float32)
    if reason:
        yield {"suite": SUITE, "not_measured": reason}
        return
    with torch.inference_mode():
        for width in WIDTHS:
            yield from _records_of(width, repeats)


def _records_of(width: int, repeats: int) -> Iterator[Record]:
    config = BertConfig(
        hidden_size=width, num_attention_heads=width // 64, intermediate_size=4 * width, num_hidden_layers=1
    )
    model = ee.to_early_exit(BertForSequenceClassification(config).eval())
    own = model.adapter.layers(model.backbone)[0]
    backend = "torch" if available_backends("cpu")["cpp"] else "cpp"
    weights = read_bert_layer(own, model.adapter.names, config)
    layers: dict[str, Any] = {BASELINE: own}
    if kernels_unsupported_reason(torch.float32) is None:
        layers |= {"fused, vector kernels": PackedLayer.of(weights, torch.float32)}
    layers |= {f"fused, {name}": OneDnnLayer.of(weights, products) for name, products in WAYS.items()}
    variants = {name: Variant("eager", backend, "float32", name) for name in layers}
    in_use = f"without vector kernels, up to {products_here().packed_up_to} tokens oneDNN"
    in_use += " with the activation" * products_here().with_activation
    for rows in ROWS:
        shape, batch = f"H {width}, T {rows * LENGTH}", pack(torch.ones(rows, LENGTH, dtype=torch.long), None)
        call = partial(_run, torch.randn(1, rows * LENGTH, width), plan_attention(batch))
        case = PreparedCase({v: Implementation(v, partial(call, layers[name])) for name, v in variants.items()})
        times = case.times(rounds=repeats, warmup=3, progress=shape)
        for name, variant in variants.items():
            record = {"suite": SUITE, "case": name, "shape": shape, "dtype": "float32", "engine": "eager"}
            record |= {"backend": backend, "baseline": BASELINE, "in_use": in_use, "goal": None}
            record |= time_fields(times[variant]) | ratio_fields(times[variant], times[variants[BASELINE]])
            yield record | {"cpu_capability": torch.backends.cpu.get_cpu_capability()}


def _run(hidden: torch.Tensor, plan: Any, layer: Any) -> Any:
    return layer(hidden, plan=plan)
