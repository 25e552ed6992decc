"""Fused layers of the CPU: the library of their products, the peaks of the processor, and checks of packed weights.

- ``layer_products``, the numbers behind `onednn.PRODUCTS`: one layer of BERT's form on T packed tokens, the family's
  own, and the fused one on the package's vector kernels, with oneDNN's products, the activation after them or within,
  and with torch's.
- ``layer_roofline``: the layers of BERT-base on the vector kernels, one after the other, so that each reads its weights
  from memory, on M tokens in rows of at most 128. Operations are those of the products alone, while the time is that of
  the whole layers. The peaks are measured before and after, and the larger ones count; see `peaks`.
- ``weight_checks``: the checks that packed weights are current, of all layers that a batch runs; ``in a row`` again at
  once, from warm caches, and ``between batches`` after a forward pass of one row, which evicts the caches.

Run one with ``python -m benchmarks.run --suite layer_products``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

import earlyexit_kernels as ee
from benchmarks.goals import roofline_goal
from benchmarks.harness import (
    Implementation,
    PreparedCase,
    Record,
    Variant,
    do_nothing,
    goal_fields,
    ratio_fields,
    record_header,
    time_fields,
)
from benchmarks.micro.peaks import Peaks, measured_peaks
from earlyexit_kernels.backbones.forms_bert import read_bert_layer
from earlyexit_kernels.backends import available_backends
from earlyexit_kernels.core.attention_plan import plan_attention
from earlyexit_kernels.core.packing import pack
from earlyexit_kernels.cpu.bert import OneDnnLayer
from earlyexit_kernels.cpu.kernels import STORED, PackedLayer, kernels_unsupported_reason
from earlyexit_kernels.cpu.onednn import Products, onednn_unsupported_reason, products_here
from earlyexit_kernels.tuning.timing import quantiles

PRODUCTS, ROOFLINE, CHECKS = "layer_products", "layer_roofline", "weight_checks"
BASELINE = "family"
WIDTHS = (384, 768)
#: Rows of 16 tokens, the length of a short sentence.
ROWS, LENGTH = (1, 2, 4, 8, 16, 32, 64), 16
WAYS = {
    "oneDNN": Products(math.inf, with_activation=False),
    "oneDNN with the activation": Products(math.inf, with_activation=True),
    "torch": Products(0, with_activation=False),
}
#: Numbers of tokens beside the peaks, the longest row, and the layers.
TOKENS, LONGEST, LAYERS = (1, 8, 32, 128, 1024), 128, 12
#: Case of the checks -> layers, H and heads, and microseconds per batch that are its goal.
MODELS = {"MiniLM": (6, 384, 12), "BERT-base": (12, 768, 12)}
GOALS = {"BERT-base": 50.0}
CHECKS_PER_REPEAT = 20


def model_of(layers: int, width: int, heads: int) -> Any:
    """Return a model of BERT's form with random weights."""
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
    stock = BertForSequenceClassification(BertConfig(**sizes, intermediate_size=4 * width))
    return ee.to_early_exit(stock.eval(), pooling="first")


def run(layers: Sequence[Any], hidden: Tensor, plan: Any) -> Tensor:
    """Return hidden states ``[1, T, H]`` after some layers."""
    for layer in layers:
        hidden = layer(hidden, plan=plan)
    return hidden


def prepared(stacks: dict[Variant, Sequence[Any]], rows: int, length: int, width: int) -> PreparedCase:
    """Return the case of some stacks of layers on random packed tokens."""
    plan = plan_attention(pack(torch.ones(rows, length, dtype=torch.long), None))
    hidden = torch.randn(1, rows * length, width)
    return PreparedCase({v: Implementation(v, partial(run, layers, hidden, plan)) for v, layers in stacks.items()})


def products(repeats: int) -> Iterator[Record]:
    """Yield a record for each width, number of tokens and library."""
    if reason := onednn_unsupported_reason(torch.float32):
        yield {"suite": PRODUCTS, "not_measured": reason}
        return
    backend = "torch" if available_backends("cpu")["cpp"] else "cpp"
    here = products_here()
    in_use = f"without vector kernels, up to {here.packed_up_to} tokens oneDNN"
    in_use += " with the activation" * here.with_activation
    with torch.inference_mode():
        for width in WIDTHS:
            model = model_of(1, width, width // 64)
            own = model.adapter.layers(model.backbone)[0]
            weights = read_bert_layer(own, model.adapter.names, model.backbone.config)
            layers: dict[str, Any] = {BASELINE: own}
            if kernels_unsupported_reason(torch.float32) is None:
                layers["fused, vector kernels"] = PackedLayer.of(weights, torch.float32)
            layers |= {f"fused, {name}": OneDnnLayer.of(weights, way) for name, way in WAYS.items()}
            variants = {name: Variant("eager", backend, "float32", name) for name in layers}
            for rows in ROWS:
                shape = f"H {width}, T {rows * LENGTH}"
                case = prepared({variants[name]: [layer] for name, layer in layers.items()}, rows, LENGTH, width)
                times = case.times(rounds=repeats, warmup=3, progress=shape)
                for name, variant in variants.items():
                    record = record_header(PRODUCTS, name, variant, shape=shape, baseline=BASELINE)
                    record |= {"in_use": in_use, "goal": None} | time_fields(times[variant])
                    yield record | ratio_fields(times[variant], times[variants[BASELINE]])


def roofline(repeats: int) -> Iterator[Record]:
    """Yield a record for each number of tokens and type of weights."""
    before, base = measured_peaks(), BertConfig()
    with torch.inference_mode():
        model = model_of(LAYERS, base.hidden_size, base.num_attention_heads)
        stacks: dict[Variant, Sequence[Any]] = {}
        for stored, dtype in STORED.items():
            if reason := kernels_unsupported_reason(torch.float32, dtype):
                yield {"suite": ROOFLINE, "case": stored, "not_measured": reason}
                continue
            model.configure(path="fused", weights=stored)
            stacks[Variant("fused layers", "cpp", stored)] = model.runner._encoder(model.view()).layers
        found = []
        for tokens in TOKENS:
            rows = -(-tokens // LONGEST)
            case = prepared(stacks, rows, tokens // rows, base.hidden_size)
            times = case.times(rounds=3 * repeats, warmup=2, progress=f"M {tokens}")
            for variant, layers in stacks.items():
                weights = [x for layer in layers for x in layer.packed.weights]
                record = record_header(ROOFLINE, variant.dtype, variant, shape=f"M {tokens}") | {"tokens": tokens}
                record |= {"operations": 2 * tokens * sum(x.numel() for x in weights)}
                found.append(record | {"bytes": sum(x.nbytes for x in weights)} | time_fields(times[variant]))
    peaks = measured_peaks().best(before)
    yield from (_beside(peaks, record) for record in found)


def _beside(peaks: Peaks, record: Record) -> Record:
    """Return a record with its rates, their shares of the peaks, and its goal."""
    operations, read = (1000 * record[name] / record["median_ms"] for name in ("operations", "bytes"))
    record |= {"peak_gflops": round(peaks.operations / 1e9), "peak_gb_per_second": round(peaks.bytes / 1e9, 1)}
    record |= {"gflops": round(operations / 1e9), "gb_per_second": round(read / 1e9, 1)}
    record |= {"operations_share": round(operations / peaks.operations, 3)}
    record |= {"bytes_share": round(read / peaks.bytes, 3)}
    return record | goal_fields(roofline_goal(record["case"], record["tokens"]), record)


def checks(repeats: int) -> Iterator[Record]:
    """Yield a record for each model and state of the caches."""
    for case, sizes in MODELS.items():
        model, ids = model_of(*sizes), torch.randint(5, 1000, (1, LENGTH))
        model(input_ids=ids)
        if model.explain().path != "fused":
            yield {"suite": CHECKS, "case": case, "not_measured": model.explain().reason}
            continue
        sealed = [(made.seal, [layer]) for layer, made in model.runner.paths["fused"].layers._made.items()]
        check = partial(_all_hold, sealed)
        for caches, batch in {"in a row": do_nothing, "between batches": partial(model, input_ids=ids)}.items():
            times = timed(check, batch, repeats)
            low, median, high = (round(1e6 * x, 2) for x in quantiles(times, (0.2, 0.5, 0.8)))
            fields = {"suite": CHECKS, "case": case, "caches": caches, "goal": GOALS.get(case)}
            fields["backend"] = "python" if available_backends("cpu")["cpp"] else "cpp"
            yield fields | {"microseconds": median, "low": low, "high": high}


def _all_hold(sealed: list[tuple[Any, list[Any]]]) -> bool:
    return all(seal.holds(modules) for seal, modules in sealed)


def timed(check: Callable[[], bool], batch: Callable[[], Any], repeats: int) -> list[float]:
    """Return the seconds of each check, with a batch before it."""
    seconds = []
    with torch.inference_mode():
        for _ in range(CHECKS_PER_REPEAT * repeats):
            batch()
            start = time.perf_counter()
            current = check()
            seconds.append(time.perf_counter() - start)
            if not current:
                raise AssertionError("unchanged weights are reported as changed")
    return seconds


#: Suite -> its records, given the repeats.
SUITES = {PRODUCTS: products, ROOFLINE: roofline, CHECKS: checks}
