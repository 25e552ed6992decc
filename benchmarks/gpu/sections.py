"""The sections of ``make gpu-check``, in the order they run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.gpu import costs, exits, whole
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


def _whole(*names: str) -> dict[str, Section]:
    return {name: Section(functools.partial(whole.records, name), 120) for name in names}


SECTIONS: dict[str, Section] = {
    "costs": Section(costs.records, 120),
    **_whole("whole_float16_1", "whole_float16_32", "whole_float16_128"),
    "exit_step": Section(exits.records, 120),
    **_whole("ragged_float16", "whole_bfloat16_1", "whole_bfloat16_32", "whole_bfloat16_128"),
}
