"""Predicted microseconds of a pass of BERT-base on an H200, kernel by kernel, beside those that were measured.

    python -m benchmarks.gpu.roofline

The time of a product is the longest of three for each of its steps (multiply-adds, bytes from the L2 cache, latency of
the copies in flight), that of another kernel follows from its bytes, and each launch has a fixed time. The numbers of
the card are those that others have measured (`CARD`); nothing here was fitted to measurements of this package.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.end_to_end.forced import NEVER
from earlyexit_kernels.engine.graphs import bucket_of
from earlyexit_kernels.ops.pack_tokens import COUNTED_TOKENS
from earlyexit_kernels.ops.rows_linear_tma import FIRST_COLUMNS, TMA_TILES, tma_tiles
from earlyexit_kernels.ops.tiles import ENOUGH_TILES, SUM_PARTS, Tiles, few_tiles, tiles_for
from earlyexit_kernels.tuning.report import markdown_table

WIDTH, INNER, LAYERS, LENGTH, BYTES = 768, 3072, 12, 128, 2
BATCHES = (1, 32, 128)


@dataclass(frozen=True)
class Card:
    """What a GPU can do, in bytes and operations per microsecond, and microseconds.

    Attributes:
        l2: bytes from the L2 cache to all multiprocessors; Triton's Hopper tutorials reach 7.9 TB/s.
        memory: bytes from memory.
        tensor: half-precision operations of the matrix units.
        adds: float32 additions.
        processors: multiprocessors.
        gap: from the end of a kernel in a graph to the start of the next one.
        latency: of a copy from L2 or memory.
        launch: fixed time of a kernel.
    """

    l2: float = 8.0e6
    memory: float = 4.3e6
    tensor: float = 790e6
    adds: float = 30e6
    processors: int = 132
    gap: float = 1.2
    latency: float = 0.75
    launch: float = 1.5


CARD = Card()
#: Microseconds of an IF node.
NODE = 3.0
#: Microseconds of a kernel before layer 1, but for bytes. In `pack_tokens` and `rows_embed` three loads wait for each
#: other (sizes, mask, ids; count, index, embedding), of which the fixed time of a kernel has one: 1.5 + 1.2 + 2 x 0.75.
FRONT = CARD.launch + CARD.gap + 2 * CARD.latency
#: Microseconds of one access alone to the L2 cache and to memory, and of an exit's sums and decision.
HIT, MISS, DECISION = 0.2, 0.6, 0.5
#: Name of a product -> weights side by side, columns and terms of a sum, and whether K is summed in parts.
PRODUCTS = {
    "query, key, value": (3, WIDTH, WIDTH, False),
    "attention output": (1, WIDTH, WIDTH, True),
    "intermediate": (1, INNER, WIDTH, False),
    "output": (1, WIDTH, INNER, True),
}
#: Part of a pass -> how its kernels' names begin.
PARTS = {
    "products": ("rows_linear",),
    "attention": ("rows_attention",),
    "norms": ("rows_add_norm",),
    "exits": ("exit_kernel", "void earlyexit::exit_kernel"),
    "moves": ("gather_rows", "void earlyexit::(anonymous namespace)::gather_rows"),
}


def parts_of(capacity: int, columns: int, in_parts: bool) -> int:
    """Return how many parts of K are computed side by side."""
    return SUM_PARTS if in_parts and few_tiles(torch.float16, capacity, columns) else 1


def tiles_of(capacity: int, columns: int, weights: int = 1, in_parts: bool = False) -> Tiles:
    """Return the tiles of a half-precision product on a Hopper card."""
    parts = parts_of(capacity, columns, in_parts)
    bulk = tma_tiles(capacity, columns, CARD.processors, in_parts)
    if parts == 1 and bulk.count(capacity, columns) >= ENOUGH_TILES:
        return bulk
    return tiles_for(torch.float16, capacity, parts * weights * columns, torch.device("cpu"))


def l2_bytes(tiles: Tiles, tokens: int, columns: int, terms: int) -> int:
    """Return the bytes that the tiles of a product read from the L2 cache."""
    return tiles.count(tokens, columns) * (tiles.rows + tiles.columns) * terms * BYTES


def product_us(name: str, tokens: int, capacity: int) -> float:
    """Return the time of a product of some live tokens."""
    weights, columns, terms, in_parts = PRODUCTS[name]
    parts, tiles = parts_of(capacity, columns, in_parts), tiles_of(capacity, columns, weights, in_parts)
    launches, wide = (weights, columns) if tiles in TMA_TILES else (1, parts * weights * columns)
    count = tiles.count(tokens, wide)
    narrow, programs = replace(tiles, columns=FIRST_COLUMNS), min(CARD.processors, tiles.count(capacity, wide))
    if tiles == TMA_TILES[-1] and narrow.count(tokens, wide) <= programs:
        tiles, count = narrow, narrow.count(tokens, wide)
    processors = min(CARD.processors, count)
    step = (tiles.rows + tiles.columns) * tiles.depth * BYTES
    by_matrix_units = 2 * tiles.rows * tiles.columns * tiles.depth * CARD.processors / CARD.tensor
    by_l2 = step * processors / CARD.l2
    by_latency = CARD.latency / (tiles.stages - 1)
    steps = math.ceil(terms / parts / tiles.depth)
    between = SUM_PARTS - 1 if in_parts and parts == 1 else 0
    adds = between * tiles.rows * tiles.columns * CARD.processors / CARD.adds
    tile = max(steps * by_matrix_units + adds, steps * by_l2, steps * by_latency)
    return launches * (math.ceil(count / processors) * tile + CARD.launch + CARD.gap)


def front_us(tokens: int) -> float:
    """Return the time before layer 1: two kernels, or three where the tokens are counted first.

    Embeddings of words and positions are read and the sum is written; those of types stay in the L1 cache.
    """
    return (2 + (tokens > COUNTED_TOKENS)) * FRONT + tokens * 3 * WIDTH * BYTES / _source(tokens)


def _source(tokens: int) -> float:
    """Return the bytes per microsecond of kernels that read what the kernel before has written."""
    return CARD.memory if tokens > 8192 else CARD.l2


def exit_us(rows: int) -> float:
    """Return the time of an exit, which is that of the accesses that wait for one another.

    The row's id, then its token, hit the cache, while the weight and bias come from memory: the longer of the two.
    After the decision, which reads no memory, the blocks of a batch write their rows, wait for these writes and take a
    ticket, and the last one reads the totals: four hits. One row needs no ticket. So a batch takes
    1.5 + max(2 x 0.2, 0.6) + 0.5 + 4 x 0.2 = 3.4 us, and a row 2.6 us.
    """
    return CARD.launch + max(2 * HIT, MISS) + DECISION + (4 * HIT if rows > 1 else 0.0)


def layer_us(tokens: int, capacity: int) -> dict[str, float]:
    """Return the times of one encoder layer by part."""
    bytes_of_token, source = WIDTH * BYTES, _source(tokens)
    attention = tokens * 4 * bytes_of_token / source + 2 * CARD.launch
    # parts of the product are written and read as float32; its only write otherwise belongs to the product
    parts = parts_of(capacity, WIDTH, in_parts=True)
    read = BYTES if parts == 1 else 2 * 4 * parts
    norm = tokens * WIDTH * (read + 2 * BYTES) / source
    return {
        "products": sum(product_us(name, tokens, capacity) for name in PRODUCTS),
        "attention": attention + CARD.gap,
        "norms": 2 * (norm + CARD.launch + CARD.gap),
    }


def pass_us(rows: int, exits: str) -> dict[str, float]:
    """Return the times of one pass by part; at mean depth 6 as many rows leave at every layer."""
    bucket = bucket_of(rows, LENGTH)
    found = {**dict.fromkeys(PARTS, 0.0), "rest": front_us(rows * LENGTH)}
    for layer in range(1, LAYERS + 1):
        if exits != NEVER and rows == 1 and layer > LAYERS / 2:
            found["rest"] += CARD.launch  # an IF node that is skipped
            continue
        live = 1.0 if exits == NEVER or rows == 1 else max(1 / rows, 1 - (layer - 1) / LAYERS)
        for part, time in layer_us(max(1, round(rows * live)) * LENGTH, bucket.tokens).items():
            found[part] += time
        found["exits"] += exit_us(rows) + CARD.gap
        if layer < LAYERS:
            found["rest"] += NODE
            if bucket.rows > 1:  # a single row is never moved
                found["moves"] += CARD.launch + CARD.gap
    return found


def measured(results: Path | None = None) -> dict[tuple[str, str], float]:
    """Return the microseconds of each part in the section ``kernels``, by case and part, where it has run."""
    found: dict[tuple[str, str], float] = {}
    for document in harness.documents(results).values():
        for record in document["records"]:
            if record["suite"] == "gpu_kernels" and record["dtype"] == "float16":
                part = next((p for p, names in PARTS.items() if record["engine"].startswith(names)), "rest")
                key = record["case"], part
                found[key] = found.get(key, 0.0) + float(record["microseconds"])
    return found


def table(results: Path | None = None) -> str:
    """Return the predicted and, where there are any, the measured microseconds of a pass."""
    known = measured(results)
    rows = [_row(batch, exits, known) for batch in BATCHES for exits in (NEVER, _half(batch))]
    return markdown_table(("pass", *PARTS, "rest", "together, us"), rows)


def _row(batch: int, exits: str, known: Mapping[tuple[str, str], float]) -> Sequence[str]:
    case, predicted = f"B {batch}, {exits}", pass_us(batch, exits)
    # no kernel stands for a part that does not run
    own: dict[str, Any] = {part: known.get((case, part)) for part, time in predicted.items() if time}
    cells = [_cell(time, own.get(part)) for part, time in predicted.items()]
    total = None if None in own.values() else sum(own.values())
    return case, *cells, _cell(sum(predicted.values()), total)


def _cell(predicted: float, is_: float | None) -> str:
    return f"{predicted:.0f}" if is_ is None else f"{predicted:.0f}, measured {is_:.0f}"


def _half(batch: int) -> str:
    from benchmarks.gpu.whole import half_of

    return half_of(batch)


if __name__ == "__main__":
    print(table())
