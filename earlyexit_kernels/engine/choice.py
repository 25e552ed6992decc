"""The engine that `auto` takes for a batch on a GPU, from a table of measurements."""

from __future__ import annotations

from typing import NamedTuple

ENGINES = ("auto", "eager", "graph")
#: Reason of a choice that the user made.
REQUESTED = "it was requested"
#: GPU name as torch reports it, or a part of it -> the fastest engine for batches of up to a number of padded tokens,
#: ascending; the last entry also serves larger batches. From benchmarks/results, by `make gpu-check`.
FASTEST: dict[str, tuple[tuple[int, str], ...]] = {}


class Choice(NamedTuple):
    """A chosen engine, kind of layers or kind of products, and the reason."""

    name: str
    reason: str


def fastest(gpu: str, rows: int, length: int) -> Choice:
    """Return the fastest measured engine for a batch, or ``"eager"`` for a GPU without measurements.

    Args:
        gpu: name as torch reports it.
        rows, length: N and S of the padded batch.
    """
    found = next((table for name, table in FASTEST.items() if name in gpu), None)
    if found is None:
        return Choice("eager", f"no measurement of {gpu} is in the table")
    most, engine = next((entry for entry in found if rows * length <= entry[0]), found[-1])
    size = f"up to {most} padded tokens a batch"
    if rows * length > most:
        size = f"at {most} padded tokens a batch, the most that was measured"
    return Choice(engine, f"it was the fastest on {gpu} {size}")


class Explanation(NamedTuple):
    """How a model would run a batch.

    Attributes:
        engine: ``"eager"`` or ``"graph"``, and why.
        layers: ``"family"`` or ``"fused"``, and why; the graph engine uses its own kernels instead.
        backend: of the exits.
        nodes: whose IF nodes a graph has, ``"extension"``, ``"torch"`` or ``"none"``, and why; None without a graph.
        products: what computes the matrix products of fused layers, and why: ``"avx512"`` or ``"avx2"`` (the vector
            kernels of the package), ``"onednn"`` or ``"torch"``; None for the family's layers.
        weights: type in which fused layers store their weights, such as ``"float32"``; None for the family's layers.
    """

    engine: Choice
    layers: Choice
    backend: str
    nodes: Choice | None = None
    products: Choice | None = None
    weights: str | None = None

    def __str__(self) -> str:
        lines = [
            f"engine {self.engine.name!r}: {self.engine.reason}",
            f"layers {self.layers.name!r}: {self.layers.reason}",
        ]
        if self.products is not None:
            how = f"{self.products.reason}, weights in {self.weights!r}"
            lines.append(f"products of the layers {self.products.name!r}: {how}")
        lines.append(f"back-end of the exits: {self.backend!r}")
        if self.nodes is not None:
            lines.append(f"IF nodes {self.nodes.name!r}: {self.nodes.reason}")
        return "\n".join(lines)
