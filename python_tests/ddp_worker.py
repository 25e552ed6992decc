"""Train three steps on this process's half of the batch and store the gradients; `test_ddp.py` starts two of these.

python ddp_worker.py FOLDER RANK WORLD; the test itself runs `steps` on the whole batch, without DDP.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import CLASSES, batch_for, early_exit
from torch.nn.parallel import DistributedDataParallel

CASES = {
    "bert": {},
    "roberta": {"pooling": "mean"},
    "albert": {"halting": True},
    "bert, label smoothing": {"pooling": "first"},
}
STEPS, BATCH, RATE = 3, 8, 0.05


def steps(case: str, rank: int, world: int) -> dict:
    """Gradients and losses of each step, and the weights after the last."""
    family, _, smoothing = case.partition(", ")
    model = early_exit(family, dropout=0.0, **CASES[case]).train()
    wrapped = DistributedDataParallel(model, find_unused_parameters=False) if dist.is_initialized() else model
    optimiser = torch.optim.SGD(model.parameters(), lr=RATE)
    labels = torch.arange(BATCH) % CLASSES
    mine = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    gradients, losses = [], []
    for step in range(STEPS):
        batch = batch_for(model, lengths=[9, 4, 6, 9, 3, 9, 8, 5], seed=step)
        optimiser.zero_grad()
        inputs = {name: value[mine] for name, value in batch.items()}
        if smoothing:  # as the Trainer does it: from the logits of the last exit, and still no parameter is unused
            loss = F.cross_entropy(wrapped(**inputs).logits, labels[mine], label_smoothing=0.1)
        else:
            loss = wrapped(**inputs, labels=labels[mine]).loss
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        losses.append(loss.detach())
        optimiser.step()
    return {"gradients": gradients, "losses": losses, "state": model.state_dict()}


def main(folder: Path, rank: int, world: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world)
    torch.save({case: steps(case, rank, world) for case in CASES}, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
