"""Compute the loss of half of the rows, with gradients averaged as by DDP; `test_loss_processes.py` starts two
processes.

Usage: python loss_worker.py FOLDER RANK WORLD
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from support.loss_cases import CASES, ROWS, take, tensors
from torch import Tensor

WANTED = ("smartbert, encoder", "smartbert, linear penalty", "ensemble, by batch", "ensemble", "dact", "palbert")


def run(name: str, rank: int, world: int) -> dict[str, Tensor]:
    """Return the loss and gradients of a case on the rows of one process; on all rows if `world` is 1."""
    case = CASES[name]
    trace, labels = case.trace(), case.labels()
    rows = list(range(rank * ROWS // world, (rank + 1) * ROWS // world))
    loss = case.loss(take(trace, rows), labels[rows])
    loss.backward()
    found = {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in tensors(trace).items()}
    for gradient in found.values():
        if world > 1:
            dist.all_reduce(gradient)
            gradient /= world
    return {"loss": loss.detach(), **found}


def main(folder: Path, rank: int, world: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world)
    torch.save({name: run(name, rank, world) for name in WANTED}, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
