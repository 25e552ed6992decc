"""A loss that is not linear in its rows, computed by two processes on half of them each, equals that of one."""

from __future__ import annotations

import pytest
import torch
from support import loss_worker
from support.loss_cases import CASES
from support.rank_processes import WORLD, run_ranks

from earlyexit_kernels.methods import distributed_mean


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(loss_worker, tmp_path_factory.mktemp("methods"))


@pytest.mark.thorough
@pytest.mark.parametrize("name", loss_worker.WANTED)
def test_loss_and_gradients_equal_one_process(ranks, name):
    alone = loss_worker.run(name, 0, 1)
    first, second = (rank[name] for rank in ranks)
    assert first["loss"] != second["loss"]
    assert abs((first["loss"] + second["loss"]) / WORLD - alone["loss"]) < 1e-13
    for tensor in set(alone) - {"loss"}:
        assert torch.equal(first[tensor], second[tensor])
        assert (first[tensor] - alone[tensor]).abs().max() < 1e-13, tensor
    assert alone["logits"].abs().max() > 1e-3


def test_all_non_linear_cases_are_tested():
    """All cases that are not the mean of their halves, except one that differs from another in its projections only."""
    assert {name for name, case in CASES.items() if not case.linear} - set(loss_worker.WANTED) == {
        "smartbert, nothing projected"
    }


def test_distributed_mean_of_one_process():
    x = torch.tensor(3.0)
    assert distributed_mean(x) is x
