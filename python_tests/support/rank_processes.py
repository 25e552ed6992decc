"""Run a script in several processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from support.models import python_environment

WORLD = 2


def run_ranks(worker: ModuleType, folder: Path) -> list[Any]:
    """Run ``worker folder rank world`` for each rank, and load the files ``rank<k>.pt`` that they write to `folder`."""
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker.__file__), str(folder), str(rank), str(WORLD)],
            env=python_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD)]
