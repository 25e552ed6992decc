"""Which engine `auto` takes for a batch on a GPU: a small measured table, and the reason in words."""

from __future__ import annotations

from typing import NamedTuple

ENGINES = ("auto", "eager", "graph")
#: Name of a GPU, as torch gives it, or a part of it -> the engine that was the fastest for batches up to a number of
#: padded tokens, ascending; the last one serves larger batches too. From benchmarks/results, by `make gpu-check`.
FASTEST: dict[str, tuple[tuple[int, str], ...]] = {}


class Choice(NamedTuple):
    """What was chosen, an engine or a kind of layers, and why."""

    name: str
    reason: str


def fastest(gpu: str, rows: int, length: int) -> Choice:
    """The engine for a batch of `rows` rows, padded to `length` tokens.

    Args:
        gpu: its name.
        rows, length: N and S.
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
        layers: ``"family"`` or ``"fused"``, and why; a graph has kernels of its own.
        backend: of the ops.
    """

    engine: Choice
    layers: Choice
    backend: str

    def __str__(self) -> str:
        return (
            f"engine {self.engine.name!r}: {self.engine.reason}\n"
            f"layers {self.layers.name!r}: {self.layers.reason}\n"
            f"back-end of the ops: {self.backend!r}"
        )
