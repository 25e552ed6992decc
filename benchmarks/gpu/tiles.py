"""The products of a BERT-base layer in tiles of several sizes, by tokens: the entries for `TILES` and `TMA_TILES`.

As in the section ``products``, one timing runs a product for all layers, each with its own weight, after a flush.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from benchmarks.gpu.bench import Bench, header, micros
from benchmarks.gpu.products import LAYERS, PRODUCTS, TOLERANCE
from benchmarks.harness import Checked, Implementation, Record, Variant
from earlyexit_kernels.ops.rows_linear import rows_linear_tiled
from earlyexit_kernels.ops.rows_linear_tma import TMA_TILES, has_bulk_copies, rows_linear_tma
from earlyexit_kernels.ops.tiles import BLOCK_DEPTH, RESERVED_BYTES, SUM_PARTS, TILES, Tiles, few_tiles, shared_memory

SUITE = "gpu_tiles"
#: Products before a norm, which add K in parts.
IN_PARTS = ("attention output", "output")
#: Tiles read by pointers, in use and others that spill no register; all of the depth of half precision, for equal bits.
BY_POINTERS = (
    *TILES[2],
    Tiles(128, 64, BLOCK_DEPTH, warps=8, stages=6, resident=1),
    Tiles(64, 64, BLOCK_DEPTH, warps=4, stages=8, resident=1),
)

Launch = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, bool, Tiles], None]


def _by_pointers(
    x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, out: Tensor, in_parts: bool, tiles: Tiles
) -> None:
    rows_linear_tiled(x, [weight], [bias], offsets, out, "none", False, in_parts, tiles)


def _by_bulk_copies(
    x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, out: Tensor, in_parts: bool, tiles: Tiles
) -> None:
    rows_linear_tma(x, weight, bias, offsets, out, "none", False, in_parts, tiles)


LAUNCHES: dict[str, Launch] = {"pointers": _by_pointers, "bulk copies": _by_bulk_copies}


def records(bench: Bench) -> Iterator[Record]:
    """Yield the time of each product in each tile that fits, and for each product and number of tokens the fastest."""
    dtype = bench.dtypes[0]
    for name, sizes in PRODUCTS.items():
        n, k = (size * bench.width for size in sizes)
        weights = [bench.random(n, k, dtype=dtype, seed=layer) for layer in range(LAYERS)]
        for tokens in bench.tiled:
            yield from _product(bench, name, weights, tokens, dtype)


def entries(x: Tensor, columns: int, in_parts: bool) -> dict[str, tuple[str, Tiles]]:
    """Return label -> a launch and its tiles, for a product of ``x [T, K]``; equal tiles stand once.

    Args:
        x: its tokens.
        columns: N.
        in_parts: whether K is added in parts.
    """
    limit, split = shared_memory(x.device) - RESERVED_BYTES, in_parts and few_tiles(x.dtype, x.shape[0], columns)
    fitted = (tiles.fitted(x.element_size(), limit) for tiles in BY_POINTERS)
    found = [("pointers", tiles) for tiles in fitted if tiles.shared_bytes(x.element_size()) <= limit]
    if has_bulk_copies(x.device) and not split:
        found += [("bulk copies", tiles) for tiles in (TMA_TILES[-1:] if in_parts else TMA_TILES)]
    return {f"{tiles.rows} x {tiles.columns}, {tiles.warps} warps, {way}": (way, tiles) for way, tiles in found}


def _product(bench: Bench, name: str, weights: list[Tensor], tokens: int, dtype: str) -> Iterator[Record]:
    (n, k), in_parts = weights[0].shape, name in IN_PARTS
    x, bias, offsets = bench.random(tokens, k, dtype=dtype), weights[0][:, 0].contiguous(), bench.ints([0, tokens])
    split = in_parts and few_tiles(x.dtype, tokens, n)
    out = bench.random(SUM_PARTS, tokens, n) if split else x.new_zeros(tokens, n)
    want = F.linear(x.float(), weights[-1].float(), None if split else bias.float())
    known = entries(x, n, in_parts)

    def build(variant: Variant) -> Implementation:
        way, tiles = known[variant.engine]
        calls = [functools.partial(LAUNCHES[way], x, weight, bias, offsets, out, in_parts, tiles) for weight in weights]
        graph = functools.cache(lambda: bench.graph_of(calls))

        def check() -> Checked:
            out.fill_(float("nan"))
            calls[-1]()
            got = out.sum(0) if split else out.float()
            off = float((got - want).abs().max() / want.abs().max())
            if not off <= TOLERANCE[dtype]:
                return Checked(f"its answer is {off:.2g} of the largest number off")
            graph()
            return Checked()

        return Implementation(variant, lambda: graph()(), check)

    def named(variant: Variant) -> Record:
        return header(SUITE, name, variant.engine, shape=shape, dtype=dtype, backend=variant.backend)

    shape = f"M {tokens}, N {n}, K {k}" + f", {SUM_PARTS} parts side by side" * split
    variants = [Variant(label, bench.encoder, dtype) for label in known]
    case = harness.prepare((variant, functools.partial(build, variant)) for variant in variants)
    yield from case.skipped_records(named)
    if not case.ready:
        return
    times = bench.times({variant.engine: found.call for variant, found in case.ready.items()})
    measured = {variant: named(variant) | micros(times[variant.engine], LAYERS) for variant in case.ready}
    yield from measured.values()
    best = min(measured, key=lambda variant: measured[variant]["median_us"])
    way, tiles = known[best.engine]
    yield header(SUITE, name, "the fastest", shape=shape, dtype=dtype, backend=way) | {
        "fastest": repr(tiles),
        "median_us": measured[best]["median_us"],
    }
