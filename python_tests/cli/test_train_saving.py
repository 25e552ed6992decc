"""Failed saves of `earlyexit train`."""

from __future__ import annotations

import math
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoTokenizer

from earlyexit_cli import main
from earlyexit_kernels import EarlyExitForSequenceClassification
from earlyexit_kernels.cli import train
from earlyexit_kernels.cli.recipe import RECIPE_FILE, Recipe
from earlyexit_kernels.data import toy
from earlyexit_kernels.tasks import load


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Arguments that train on a few rows, and the output folder; temporary files go to ``tmp_path/temporary``."""
    toy.toy_model(0, layers=2, hidden=16).save_pretrained(tmp_path / "base")
    toy.toy_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(load, "toy_splits", partial(load.toy_splits, train_rows=40, dev_rows=8, test_rows=0))
    rows = ["--train-rows", "16", "--holdout", "24", "--batch-size", "16", "--epochs", "1"]
    output = tmp_path / "output"
    return ["train", "--model", str(tmp_path / "base"), "--task", "toy", "--output", str(output), *rows], output


def test_full_disk_does_not_lose_the_model(command, capsys, monkeypatch, tmp_path):
    arguments, output = command

    def save(tensors, path, **options):
        if output in Path(path).parents:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        save_file(tensors, path, **options)

    assert main(arguments) == 0
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    assert {"config.json", "model.safetensors", RECIPE_FILE, "tokenizer.json"} <= before.keys()
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", save)
    capsys.readouterr()
    assert main([*arguments, "--seed", "1", "--overwrite"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    rescued = next((tmp_path / "temporary").glob("earlyexit-*"))
    assert line.startswith("error: ") and "No space left" in line and f"the trained model is in {rescued}" in line
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert EarlyExitForSequenceClassification.from_pretrained(rescued).depth == 2
    assert Recipe.load(rescued).seed == 1 and AutoTokenizer.from_pretrained(rescued).vocab_size


def test_diverged_weights_are_refused(command, capsys, monkeypatch):
    arguments, output = command

    def diverge(phase, *_):
        with torch.no_grad():
            phase.model.heads.out[0].weight.fill_(math.nan)

    monkeypatch.setattr(train, "_train_phase", diverge)
    assert main(arguments) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and "heads.out.0.weight" in line and "lower learning rate" in line
    assert not any(output.iterdir())
