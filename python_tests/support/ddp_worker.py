"""Train three steps on half of the batch and store the gradients; `test_ddp.py` starts two processes.

Usage: python ddp_worker.py FOLDER RANK WORLD. The test calls `steps` on the whole batch, without DDP.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers as tf
from support.models import CLASSES, batch_for, early_exit, ragged, rows_of, tokenizer
from torch.nn.parallel import DistributedDataParallel

import earlyexit_kernels as ee
from earlyexit_kernels.methods import METHODS

CASES = {
    "bert": {},
    "roberta": {"pooling": "mean"},
    "albert": {"halting": True},
    "bert, label smoothing": {"pooling": "first"},
    **{
        f"bert, {name}, phase {phase}": {"method": name}
        for name, method in METHODS.items()
        for phase in range(len(method().phases))
        if name not in ("joint", "pabee")
    },
}
STEPS, BATCH, RATE = 3, 8, 0.05
#: Epochs done before each step; the gates of SmartBERT become hard at the third.
EPOCHS = (0.0, 1.5, 3.0)


def steps(case: str, rank: int, world: int) -> dict:
    """Return gradients and losses of each step, and the weights after the last step."""
    family, *more = case.split(", ")
    smoothing = more == ["label smoothing"]
    model = early_exit(family, dropout=0.0, **CASES[case]).train()
    if "method" in CASES[case]:
        model.schedule.enter(model, int(case[-1]))
    wrapped = DistributedDataParallel(model, find_unused_parameters=False) if dist.is_initialized() else model
    optimiser = torch.optim.SGD(model.parameters(), lr=RATE)
    labels = torch.arange(BATCH) % CLASSES
    own_rows = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    gradients, losses = [], []
    for step in range(STEPS):
        batch = batch_for(model, lengths=[9, 4, 6, 9, 3, 9, 8, 5], seed=step)
        optimiser.zero_grad()
        model.schedule.set_progress(step, EPOCHS[step])
        inputs = {name: value[own_rows] for name, value in batch.items()}
        if smoothing:  # as in the Trainer: from the logits of the last exit, and without unused parameters
            loss = F.cross_entropy(wrapped(**inputs).logits, labels[own_rows], label_smoothing=0.1)
        else:
            loss = wrapped(**inputs, labels=labels[own_rows]).loss
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
        losses.append(loss.detach())
        optimiser.step()
    return {"gradients": gradients, "losses": losses, "state": model.state_dict()}


def data_set() -> list:
    """Return eleven rows, which two processes with batches of three cannot share evenly."""
    return rows_of(ragged(lengths=[9, 4, 6, 9, 3, 9, 8, 5, 7, 2, 9]), torch.arange(11) % CLASSES)


def predictions(folder: Path) -> dict:
    """Return the result of `predict_with_exits` for a Trainer that distributes its batches over the processes."""
    args = tf.TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", per_device_eval_batch_size=3, ddp_backend="gloo"
    )
    run = tf.Trainer(
        model=early_exit(criterion=ee.criteria.Patience(patience=1)), args=args, processing_class=tokenizer()
    )
    assert run.args.world_size == dist.get_world_size()
    got = ee.predict_with_exits(run, data_set())
    return {name: torch.from_numpy(getattr(got, name)) for name in ("logits", "exit_layer", "layers_run", "labels")}


def main(folder: Path, rank: int, world: int) -> None:
    # accelerate requires these variables and then uses the existing group, not the address
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world)
    results = {case: steps(case, rank, world) for case in CASES}
    torch.save({**results, "predictions": predictions(folder)}, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
