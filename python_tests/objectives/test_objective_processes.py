"""A loss that isn't linear in its rows, computed by two processes on half of them each, is that of one on all."""

from __future__ import annotations

import pytest
import torch
from support import objective_worker
from support.objective_cases import CASES
from support.rank_processes import WORLD, run_ranks

from earlyexit_kernels.objectives import distributed_mean


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(objective_worker, tmp_path_factory.mktemp("objectives"))


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
