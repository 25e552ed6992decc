"""Runs one section, and writes a line for each record: ``python -m benchmarks.gpu.worker SECTION FILE``.

Each section has a process of its own, since a failed kernel leaves the GPU in an unknown state.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from benchmarks.gpu.bench import Bench, header
from benchmarks.gpu.sections import SECTIONS
from benchmarks.machine import NotMeasuredError


def work(name: str, into: Path) -> None:
    """Append the records of a section to a file as they come."""
    with into.open("a", encoding="utf-8") as file:
        try:
            for record in SECTIONS[name].records(Bench.here()):
                print(json.dumps(record), file=file, flush=True)
        except NotMeasuredError as error:
            record = header(f"gpu_{name}", name, "everything") | {"not_measured": str(error)}
            print(json.dumps(record), file=file, flush=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    work(sys.argv[1], Path(sys.argv[2]))
