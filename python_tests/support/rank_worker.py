"""One of the processes of a distributed run; `test_processes.py` starts two, and calls the same functions alone.

Usage: python rank_worker.py FOLDER RANK WORLD writes the results to ``FOLDER/rank<RANK>.pt``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers as tf
from support.loss_cases import CASES, ROWS, take, tensors
from support.models import CLASSES, batch_for, early_exit, python_environment, ragged, rows_of, tokenizer
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import earlyexit_kernels as ee
from earlyexit_kernels.methods import METHODS

WORLD = 2
#: Models whose training is distributed, by the arguments of their conversion.
MODELS: dict[str, dict[str, Any]] = {
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
#: Losses that are not the mean of those of their rows, and some that are.
LOSSES = ("smartbert, encoder", "smartbert, linear penalty", "ensemble, by batch", "ensemble", "dact", "palbert")
BATCH, RATE = 8, 0.05
#: Epochs done before each step; the gates of SmartBERT become hard at the last one.
EPOCHS = (0.0, 3.0)


def training(case: str, rank: int, world: int) -> dict[str, Any]:
    """Return gradients and losses of each step, and the weights after the last one."""
    family, *more = case.split(", ")
    smoothing = more == ["label smoothing"]
    model = early_exit(family, dropout=0.0, **MODELS[case]).train()
    if "method" in MODELS[case]:
        model.schedule.enter(model, int(case[-1]))
    wrapped = DistributedDataParallel(model, find_unused_parameters=False) if dist.is_initialized() else model
    optimiser = torch.optim.SGD(model.parameters(), lr=RATE)
    labels = torch.arange(BATCH) % CLASSES
    rows = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    gradients, losses = [], []
    for step, epoch in enumerate(EPOCHS):
        batch = batch_for(model, lengths=[9, 4, 6, 9, 3, 9, 8, 5], seed=step)
        optimiser.zero_grad()
        model.schedule.set_progress(step, epoch)
        inputs = {name: value[rows] for name, value in batch.items()}
        if smoothing:  # as in the Trainer: from the logits of the last exit, and without unused parameters
            loss = F.cross_entropy(wrapped(**inputs).logits, labels[rows], label_smoothing=0.1)
        else:
            loss = wrapped(**inputs, labels=labels[rows]).loss
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
        losses.append(loss.detach())
        optimiser.step()
    return {"gradients": gradients, "losses": losses, "state": model.state_dict()}


def loss(name: str, rank: int, world: int) -> dict[str, Tensor]:
    """Return the loss and the gradients of a case on the rows of one process, averaged as by DDP."""
    case = CASES[name]
    trace, labels = case.trace(), case.labels()
    rows = list(range(rank * ROWS // world, (rank + 1) * ROWS // world))
    value = case.loss(take(trace, rows), labels[rows])
    value.backward()
    gradients = {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in tensors(trace).items()}
    for gradient in gradients.values():
        if world > 1:
            dist.all_reduce(gradient)
            gradient /= world
    return {"loss": value.detach(), **gradients}


def data_set() -> list[Any]:
    """Return eleven rows, which two processes with batches of three cannot share evenly."""
    return rows_of(ragged(lengths=[9, 4, 6, 9, 3, 9, 8, 5, 7, 2, 9]), torch.arange(11) % CLASSES)


def predictions(folder: Path) -> dict[str, Tensor]:
    """Return the result of `predict_with_exits` for a Trainer that distributes its batches over the processes."""
    args = tf.TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", per_device_eval_batch_size=3, ddp_backend="gloo"
    )
    model = early_exit(criterion=ee.criteria.Patience(patience=1))
    run = tf.Trainer(model=model, args=args, processing_class=tokenizer())
    assert run.args.world_size == dist.get_world_size()
    got = ee.predict_with_exits(run, data_set())
    return {name: torch.from_numpy(getattr(got, name)) for name in ("logits", "exit_layer", "layers_run", "labels")}


def run_ranks(folder: Path) -> list[Any]:
    """Run this file in `WORLD` processes, and return the results of each."""
    command = [sys.executable, __file__, str(folder)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(WORLD)],
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


def main(folder: Path, rank: int, world: int) -> None:
    # accelerate requires these variables and then uses the existing group, not the address
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world)
    results: dict[str, Any] = {case: training(case, rank, world) for case in MODELS}
    results["losses"] = {name: loss(name, rank, world) for name in LOSSES}
    torch.save({**results, "predictions": predictions(folder)}, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
