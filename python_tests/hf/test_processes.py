"""Two processes with half of the data each train and predict like one process with all of it."""

from __future__ import annotations

import pytest
import torch
from support import rank_worker
from support.loss_cases import CASES
from support.models import early_exit
from support.rank_worker import WORLD

import earlyexit_kernels as ee


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return rank_worker.run_ranks(tmp_path_factory.mktemp("ranks"))


@pytest.mark.thorough
@pytest.mark.parametrize("case", rank_worker.MODELS)
def test_gradients_equal_one_process_with_the_whole_batch(ranks, case):
    alone = rank_worker.training(case, 0, 1)
    for step in range(len(rank_worker.EPOCHS)):
        losses = [rank[case]["losses"][step] for rank in ranks]
        assert losses[0] != losses[1]
        assert torch.allclose(sum(losses) / WORLD, alone["losses"][step], atol=1e-6)
        for name, gradient in alone["gradients"][step].items():
            first, second = (rank[case]["gradients"][step][name] for rank in ranks)
            assert torch.equal(first, second), name
            scale = max(1.0, gradient.abs().max().item())
            assert (first - gradient).abs().max() < 5e-6 * scale, name
    assert any(gradient.abs().max() > 1e-3 for gradient in alone["gradients"][0].values())
    for name, value in alone["state"].items():
        assert (ranks[0][case]["state"][name] - value).abs().max() < 1e-6, name


@pytest.mark.thorough
@pytest.mark.parametrize("name", rank_worker.LOSSES)
def test_losses_equal_those_of_one_process(ranks, name):
    """Also those that are not linear in their rows."""
    alone = rank_worker.loss(name, 0, 1)
    first, second = (rank["losses"][name] for rank in ranks)
    assert first["loss"] != second["loss"]
    assert abs((first["loss"] + second["loss"]) / WORLD - alone["loss"]) < 1e-13
    for tensor in set(alone) - {"loss"}:
        assert torch.equal(first[tensor], second[tensor])
        assert (first[tensor] - alone[tensor]).abs().max() < 1e-13, tensor
    assert alone["logits"].abs().max() > 1e-3


def test_all_losses_that_are_not_linear_run_in_two_processes():
    """Except one that differs from another in its projections only."""
    left_out = {name for name, case in CASES.items() if not case.linear} - set(rank_worker.LOSSES)
    assert left_out == {"smartbert, nothing projected"}


@pytest.mark.thorough
def test_predictions_are_of_the_whole_data_set(ranks):
    """Every process gets all rows once, in the order of the data set."""
    model = early_exit(criterion=ee.criteria.Patience(patience=1))
    expected = ee.predict_with_exits(model, rank_worker.data_set())
    for rank in ranks:
        got = rank["predictions"]
        assert len(got["exit_layer"]) == 11
        for name in ("exit_layer", "layers_run", "labels"):
            assert (got[name].numpy() == getattr(expected, name)).all(), name
        assert abs(got["logits"].numpy() - expected.logits).max() < 1e-5
