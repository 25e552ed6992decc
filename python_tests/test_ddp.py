"""Two processes on half of the work each train and predict as one process on all of it, every parameter used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ddp_worker
import pytest
import torch
from models import early_exit, python_environment

import earlyexit_kernels as ee

WORLD = 2


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    script = Path(ddp_worker.__file__)
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


@pytest.mark.parametrize("case", ddp_worker.CASES)
def test_gradients_equal_one_process_with_the_whole_batch(ranks, case):
    alone = ddp_worker.steps(case, 0, 1)
    for step in range(ddp_worker.STEPS):
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


def test_predictions_are_of_the_whole_data_set(ranks):
    """Every process gets all rows, in the order of the data set and none twice."""
    model = early_exit(criterion=ee.criteria.Patience(patience=1))
    expected = ee.predict_with_exits(model, ddp_worker.data_set())
    for rank in ranks:
        got = rank["predictions"]
        assert len(got["exit_layer"]) == 11
        for name in ("exit_layer", "layers_run", "labels"):
            assert (got[name].numpy() == getattr(expected, name)).all(), name
        assert abs(got["logits"].numpy() - expected.logits).max() < 1e-5
