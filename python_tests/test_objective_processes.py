"""A loss that isn't linear in its rows, computed by two processes on half of them each, is that of one on all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import objective_worker
import pytest
import torch
from models import python_environment
from objective_cases import CASES

from earlyexit_kernels.objectives import distributed_mean

WORLD = 2


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("objectives")
    script = Path(objective_worker.__file__)
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder), str(rank), str(WORLD)],
            env=python_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        outputs = [process.communicate(timeout=150)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("name", objective_worker.WANTED)
def test_loss_and_gradients_equal_one_process(ranks, name):
    alone = objective_worker.run(name, 0, 1)
    first, second = (rank[name] for rank in ranks)
    assert first["loss"] != second["loss"]
    assert abs((first["loss"] + second["loss"]) / WORLD - alone["loss"]) < 1e-13
    for tensor in set(alone) - {"loss"}:
        assert torch.equal(first[tensor], second[tensor])
        assert (first[tensor] - alone[tensor]).abs().max() < 1e-13, tensor
    assert alone["logits"].abs().max() > 1e-3


def test_the_cases_that_need_it_are_among_them():
    """Every case that isn't the mean of its halves, but for one that lacks the projections of another."""
    assert {name for name, case in CASES.items() if not case.linear} - set(objective_worker.WANTED) == {
        "smartbert, nothing projected"
    }


def test_one_process_keeps_its_mean():
    x = torch.tensor(3.0)
    assert distributed_mean(x) is x
