"""The suite ``micro``: the groups of the files ``bench_*.py``, timed by the harness."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.harness import Record
from benchmarks.machine import device
from benchmarks.micro import bench_compact, bench_exit_step
from benchmarks.micro.decisions import untimeable
from benchmarks.micro.groups import SUITE


def records(repeats: int) -> Iterator[Record]:
    """Yield a record for each variant of each case, and for each back-end that cannot be timed here."""
    for backend, reason in untimeable(device()).items():
        if reason:
            yield {"suite": SUITE, "backend": backend, "device": device(), "not_measured": reason}
    with torch.inference_mode():
        for module in (bench_compact, bench_exit_step):
            for case in module.CASES:
                yield from module.group_of(case).records(repeats)
