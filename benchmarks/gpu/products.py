"""`rows_linear` beside cuBLAS and torch's grouped product: the four products of a BERT-base layer, by their tokens.

One timing runs a product for as many layers as BERT-base has, each with a weight of its own; the cache is flushed
before, so weights come from memory, as they do in a model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.bench import Bench, Call, Record, beside, head, middle
from earlyexit_kernels.ops import rows_linear

SUITE = "gpu_products"
OURS, CUBLAS, GROUPED = "rows_linear", "cuBLAS", "grouped_mm"
LAYERS = 12
#: Name -> columns out and in, in widths.
PRODUCTS = {"query, key, value": (3, 1), "attention output": (1, 1), "intermediate": (4, 1), "output": (1, 4)}
#: Largest distance from float32, over the largest number of the answer: sums of up to 3072 products, rounded once.
TOLERANCE = {"float16": 2e-3, "bfloat16": 1.6e-2, "float32": 1e-5}


def records(bench: Bench) -> Iterator[Record]:
    """All products, of all numbers of tokens, in all dtypes."""
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
    fields = {"shape": f"M {tokens}, N {n}, K {k}", "dtype": dtype}
    graphs: dict[str, Call] = {}
    for way, product in WAYS.items():
        record = head(SUITE, name, way, backend=bench.encoder if way == OURS else "", **fields)
        calls = [functools.partial(product, bench, x, weight, bias, offsets, out) for weight in weights]
        try:
            # without the bias, which it can't add
            truth = want - bias.float() if way == GROUPED else want
            off = float((calls[-1]().float() - truth).abs().max() / truth.abs().max())
            if not off <= TOLERANCE[dtype]:
                yield record | {"refused": f"its answer is {off:.2g} of the largest number off"}
                continue
            graphs[way] = bench.graph_of(calls)
        except (RuntimeError, NotImplementedError, AttributeError) as error:
            yield record | {"not_measured": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
    times = bench.times(graphs) if graphs else {}
    for way, found in times.items():
        record = head(SUITE, name, way, backend=bench.encoder if way == OURS else "", **fields)
        record |= middle(found, LAYERS)
        record |= {"tflops": round(2e-6 * tokens * n * k / record["median_us"], 1)}
        yield record | (beside(found, times[CUBLAS], CUBLAS) if way != CUBLAS and CUBLAS in times else {})


def _ours(bench: Bench, x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, out: Tensor) -> Tensor:
    rows_linear(x, weight, bias, offsets, out, backend=bench.encoder)
    return out


def _cublas(bench: Bench, x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, out: Tensor) -> Tensor:
    return torch.addmm(bias, x, weight.t(), out=out)


def _grouped(bench: Bench, x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, out: Tensor) -> Tensor:
    refuse_sizes_on_the_host(x)
    return torch._grouped_mm(x, weight.t()[None], offs=offsets[1:])


def refuse_sizes_on_the_host(x: Tensor) -> None:
    """Torch's grouped product leaves the sizes on the device in bfloat16 alone. Elsewhere it reads them, and a capture
    in which that happens isn't only lost: torch 2.11 refuses every later one of the process.

    Raises:
        NotImplementedError: another dtype.
    """
    if x.dtype != torch.bfloat16:
        raise NotImplementedError(f"it reads the sizes on the host in {str(x.dtype).removeprefix('torch.')}")


WAYS: dict[str, Callable[..., Tensor]] = {OURS: _ours, CUBLAS: _cublas, GROUPED: _grouped}
