"""The sections of ``make gpu-check``, in the order they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.gpu import exits, kernels, nodes, products, promises, tiles, whole
from benchmarks.gpu.bench import Bench
from benchmarks.harness import Record


@dataclass(frozen=True)
class Section:
    """One part of the measurements, resumed as a whole.

    Attributes:
        records: yields them.
        seconds: at most; after that the records so far are kept, and the section is tried again in another run.
    """

    records: Callable[[Bench], Iterator[Record]]
    seconds: int


def _whole(dtype: str) -> dict[str, Section]:
    return {name: Section(whole.section(name), 150) for name, case in whole.CASES.items() if case[1] == dtype}


_HALF, _BFLOAT16 = _whole("float16"), _whole("bfloat16")
SECTIONS: dict[str, Section] = {
    "nodes": Section(nodes.node_records, 60),
    "empty_launches": Section(nodes.empty_records, 60),
    "kernels": Section(kernels.records, 60),
    "products": Section(products.records, 120),
    "tiles": Section(tiles.records, 240),
    **{name: _HALF[name] for name in _HALF if name.startswith("whole")},
    "conditional": Section(whole.conditional_records, 90),
    "synchronisations": Section(promises.sync_records, 60),
    "bits": Section(promises.bit_records, 180),
    "exit_step": Section(exits.step_records, 120),
    "mean_pooling": Section(exits.mean_records, 60),
    **{name: _HALF[name] for name in _HALF if not name.startswith("whole")},
    "fastest": Section(whole.fastest_records, 120),
    **_BFLOAT16,
}
