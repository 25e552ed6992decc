"""Predicted microseconds of a pass of BERT-base in float16 on an H200, from bytes, operations and launches.

    python -m benchmarks.gpu.prediction

A kernel takes the longest of three: its operations at the rate of the matrix units, its bytes at the rate of memory,
and the least time of a kernel. A layer is its kernels and the gaps between them. The host launches a layer and its exit
and waits for the counts of the exit before (`counts.LAG`), so a pass is as slow as the slower of host and device. Rows
that have left run on until the host moves the others to a smaller level (`level_size`, `compaction_pays`). Nothing was
fitted to measurements of this package; `CONSTANTS` says which numbers are published and which are estimates.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.end_to_end.forced import MIXES, NEVER
from benchmarks.end_to_end.suites import half_of
from earlyexit_kernels.core.counts import LAG
from earlyexit_kernels.core.loop import compaction_pays
from earlyexit_kernels.cuda.levels import LevelSize, level_size
from earlyexit_kernels.tuning.tables import markdown_table

WIDTH, INNER, HEADS, LAYERS, LENGTH, BYTES = 768, 3072, 12, 12, 128, 2
BATCHES = (1, 32, 128)
#: Multiply-adds of a layer's products on one token.
LAYER_MACS = 4 * WIDTH * WIDTH + 2 * WIDTH * INNER


class Constant(NamedTuple):
    """A number of the card or of the host, what it is, and where it comes from."""

    value: float
    what: str
    source: str


PUBLISHED, ESTIMATE = "NVIDIA's data sheet", "estimate"
MEMORY = Constant(4.8, "TB/s from memory", PUBLISHED)
MATRIX = Constant(989, "TFLOP/s of the matrix units, half precision, dense", PUBLISHED)
SHARE = Constant(0.7, "share of these that products and attention reach", ESTIMATE)
LEAST = Constant(2.0, "us, least time of a kernel", ESTIMATE)
STEP = Constant(0.11, "us for each 64 terms of a product's sums, least time of a product beyond that", ESTIMATE)
GAP = Constant(1.0, "us between two kernels of a graph", ESTIMATE)
STREAM_GAP = Constant(1.5, "us between two launches on a stream", ESTIMATE)
EMPTY = Constant(0.3, "us of an attention block of a row that is not there", ESTIMATE)
BLOCKS = Constant(264, "blocks of attention at a time, two for each of 132 multiprocessors", ESTIMATE)
EXIT = Constant(3.5, "us of an exit on first tokens", ESTIMATE)
COPY = Constant(2.0, "us of the copy of counts to the host", ESTIMATE)
ARRIVAL = Constant(8.0, "us from the end of a copy until the host goes on", ESTIMATE)
HOST_LAYER = Constant(30.0, "us of the host for a layer, its exit, the copy and its event", ESTIMATE)
HOST_OP = Constant(5.0, "us of the host for an operation of torch", ESTIMATE)
FRONT = Constant(31, "operations before layer 1: packing by a mask, embeddings, buffers", "counted on a CPU")
MOVE = Constant(8, "operations of a compaction into a level", "counted in the source")
WAIT = Constant(15.0, "us of the wait for the number of tokens", ESTIMATE)
STOCK = Constant(40.0, "us of the host for a call of the compiled stock model, its inputs' copies included", ESTIMATE)
CONSTANTS = (
    MEMORY, MATRIX, SHARE, LEAST, STEP, GAP, STREAM_GAP, EMPTY, BLOCKS, EXIT, COPY, ARRIVAL, HOST_LAYER, HOST_OP, FRONT,
    MOVE, WAIT, STOCK,
)  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """What is launched between the products and the attention of a layer.

    Attributes:
        name: as in the table.
        elementwise: hidden states ``[T, H]`` that each kernel reads and writes; 4 H for each of the inner width.
    """

    name: str
    elementwise: tuple[float, ...]


#: Residual, norm, GELU, residual, norm and the copy into the buffer; inductor fuses residual and norm.
PLAIN_LAYER = Layer("captured", (3, 2, 8, 3, 2, 2))
COMPILED_LAYER = Layer("captured, compiled layers", (3, 8, 3, 2))
STOCK_LAYER = Layer("stock model, compiled", (3, 8, 3))
#: Columns and terms of a layer's products.
PRODUCTS = (*[(WIDTH, WIDTH)] * 4, (INNER, WIDTH), (WIDTH, INNER))


def kernel_us(operations: float, moved: float, least: float = LEAST.value) -> float:
    """Return the time of a kernel from its operations and the bytes that it reads and writes."""
    return max(operations / (MATRIX.value * SHARE.value * 1e6), moved / (MEMORY.value * 1e6), least)


def layer_us(layer: Layer, tokens: int, present: int, missing: int) -> float:
    """Return the device's time of one layer.

    Args:
        layer: kind of layer.
        tokens: in the buffers.
        present: rows of `LENGTH` tokens.
        missing: rows that the buffers have room for, beyond these.
    """
    hidden = tokens * WIDTH * BYTES
    times = [
        kernel_us(
            2 * tokens * columns * terms,
            BYTES * (tokens * (columns + terms) + columns * terms),
            LEAST.value + STEP.value * terms / 64,
        )
        for columns, terms in PRODUCTS
    ]
    attended = present * LENGTH
    times.append(kernel_us(4 * attended * LENGTH * WIDTH, 4 * attended * WIDTH * BYTES))
    times += [kernel_us(0, share * hidden) for share in layer.elementwise]
    return sum(times) + GAP.value * len(times) + missing * HEADS * EMPTY.value / BLOCKS.value


def stock_us(rows: int) -> float:
    """Return the time of a pass of the compiled stock model, whose batch has no mask: one graph for all layers."""
    tokens = rows * LENGTH
    ends = 2 * (kernel_us(0, 4 * tokens * WIDTH * BYTES) + GAP.value) + 3 * (LEAST.value + GAP.value)
    return STOCK.value + ends + LAYERS * layer_us(STOCK_LAYER, tokens, rows, 0)


@dataclass
class Pass:
    """The clocks of a pass, in microseconds.

    Attributes:
        host, device: when each has done what it was given.
        arrived: layer -> when the host may read its counts.
    """

    host: float
    device: float
    arrived: dict[int, float]

    def run(self, layer: int, time: float) -> None:
        """Launch a layer and its exit."""
        self.host += HOST_LAYER.value
        self.device = max(self.device, self.host) + time + EXIT.value + COPY.value + 3 * STREAM_GAP.value
        self.arrived[layer] = self.device + ARRIVAL.value
        self.host = max(self.host, self.arrived.get(layer - LAG, 0.0))

    def known(self) -> int:
        """Return the last layer whose counts the host has, 0 for none."""
        return max((layer for layer, at in self.arrived.items() if at <= self.host), default=0)

    def move(self, tokens: int) -> None:
        """Move rows into a smaller level, which reads and writes their tokens twice."""
        self.host += MOVE.value * HOST_OP.value
        launches = MOVE.value * (LEAST.value + STREAM_GAP.value)
        self.device = max(self.device + launches, self.host) + kernel_us(0, 4 * tokens * WIDTH * BYTES)


def level_for(rows: int) -> LevelSize:
    """Return the level of rows of `LENGTH` tokens."""
    size = level_size(rows, rows * LENGTH, LENGTH, padded=False)
    assert size is not None
    return size


def captured_us(layer: Layer, rows: int, exits: str) -> float:
    """Return the time of a pass of captured layers.

    Args:
        layer: kind of layer.
        rows: of the batch.
        exits: a mix of `forced.MIXES`.
    """
    leaves = MIXES[exits](rows, LAYERS)
    clocks = Pass(FRONT.value * HOST_OP.value + WAIT.value, 0.0, {})
    present, size, on_cuda = rows, level_for(rows), torch.device("cuda")
    for number in range(1, LAYERS + 1):
        clocks.run(number, layer_us(layer, size.tokens, present, size.rows - present))
        live = sum(at > clocks.known() for at in leaves)
        if not live:
            break
        smaller = level_for(live)
        macs = LAYER_MACS * (LAYERS - number)
        if smaller.tokens < size.tokens and compaction_pays(size.tokens, smaller.tokens, WIDTH, macs, on_cuda):
            clocks.move(live * LENGTH)
            present, size = live, smaller
    return max(clocks.host, clocks.device + ARRIVAL.value)


def table(results: Path | None = None) -> str:
    """Return the predicted microseconds of a pass beside those of the compiled stock model."""
    kinds = (PLAIN_LAYER, COMPILED_LAYER)
    rows = []
    for batch in BATCHES:
        stock = stock_us(batch)
        for exits in (NEVER, half_of(batch)):
            times = [captured_us(kind, batch, exits) for kind in kinds]
            cells = [cell for time in times for cell in (f"{time:.0f}", f"{time / stock:.2f}")]
            rows.append((f"B {batch}, {exits}", f"{stock:.0f}", *cells))
    names = [word for kind in kinds for word in (f"{kind.name}, us", "time ratio")]
    return markdown_table(("pass", f"{STOCK_LAYER.name}, us", *names), rows)


def constants_table(results: Path | None = None) -> str:
    """Return the numbers that the prediction is made from."""
    return markdown_table(("value", "of", "source"), [(f"{c.value:g}", c.what, c.source) for c in CONSTANTS])


TABLES = {"gpu_roofline": table, "gpu_constants": constants_table}

if __name__ == "__main__":
    print(table())
