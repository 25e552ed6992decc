"""`rows_linear` beside cuBLAS: the four products of a BERT-base layer, by tokens.

One timing runs a product for as many layers as BERT-base has, each with its own weight; the cache is flushed before, so
that weights come from memory, as in a model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from benchmarks.gpu.bench import Bench, header, micros, over
from benchmarks.harness import Checked, Implementation, Record, Variant
from earlyexit_kernels.ops import rows_linear

SUITE = "gpu_products"
OURS, CUBLAS = "rows_linear", "cuBLAS"
LAYERS = 12
#: Name -> columns out and in, in widths.
PRODUCTS = {"query, key, value": (3, 1), "attention output": (1, 1), "intermediate": (4, 1), "output": (1, 4)}
#: Largest distance from float32, over the largest number of the answer: sums of up to 3072 products, rounded once.
TOLERANCE = {"float16": 2e-3, "bfloat16": 1.6e-2, "float32": 1e-5}


def records(bench: Bench) -> Iterator[Record]:
    """Yield the records of all products, numbers of tokens and dtypes."""
    for dtype in bench.dtypes:
        for name, sizes in PRODUCTS.items():
            n, k = (size * bench.width for size in sizes)
            weights = [bench.random(n, k, dtype=dtype, seed=layer) for layer in range(LAYERS)]
            for tokens in bench.products:
                yield from _product(bench, name, weights, tokens, dtype)


def _product(bench: Bench, name: str, weights: list[Tensor], tokens: int, dtype: str) -> Iterator[Record]:
    n, k = weights[0].shape
    x, bias, offsets = bench.random(tokens, k, dtype=dtype), weights[0][:, 0].contiguous(), bench.ints([0, tokens])
    out = x.new_zeros(tokens, n)
    want = F.linear(x.float(), weights[-1].float(), bias.float())

    def build(variant: Variant) -> Implementation:
        calls = [functools.partial(WAYS[variant.engine], bench, x, weight, bias, offsets, out) for weight in weights]
        graph = functools.cache(lambda: bench.graph_of(calls))

        def check() -> Checked:
            off = float((calls[-1]().float() - want).abs().max() / want.abs().max())
            if not off <= TOLERANCE[dtype]:
                return Checked(f"its answer is {off:.2g} of the largest number off")
            graph()
            return Checked()

        return Implementation(variant, lambda: graph()(), check)

    def named(variant: Variant) -> Record:
        fields = {"shape": f"M {tokens}, N {n}, K {k}", "dtype": dtype, "backend": variant.backend}
        return header(SUITE, name, variant.engine, **fields)

    variants = [Variant(way, bench.encoder if way == OURS else "", dtype) for way in WAYS]
    case = harness.prepare((variant, functools.partial(build, variant)) for variant in variants)
    yield from case.skipped_records(named)
    times = bench.times({variant.engine: found.call for variant, found in case.ready.items()}) if case.ready else {}
    for variant in case.ready:
        own = times[variant.engine]
        record = named(variant) | micros(own, LAYERS)
        record |= {"tflops": round(2e-6 * tokens * n * k / record["median_us"], 1)}
        is_compared = variant.engine != CUBLAS and CUBLAS in times
        yield record | (over(own, times[CUBLAS], CUBLAS) if is_compared else {})


def _ours(bench: Bench, x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, out: Tensor) -> Tensor:
    rows_linear(x, weight, bias, offsets, out, backend=bench.encoder)
    return out


def _cublas(bench: Bench, x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, out: Tensor) -> Tensor:
    return torch.addmm(bias, x, weight.t(), out=out)


WAYS: dict[str, Callable[..., Tensor]] = {OURS: _ours, CUBLAS: _cublas}
