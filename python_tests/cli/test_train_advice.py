"""What `earlyexit train` chooses, says and refuses where the user gave no option for it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification

from earlyexit_cli import main
from earlyexit_kernels.cli import train
from earlyexit_kernels.data import toy


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """A folder with an encoder that has no classifier."""
    folder = tmp_path_factory.mktemp("encoder")
    classifier = tmp_path_factory.mktemp("classifier")
    toy.toy_model(0, layers=3, hidden=16).save_pretrained(classifier)
    AutoModel.from_pretrained(classifier).save_pretrained(folder)
    toy.toy_tokenizer().save_pretrained(folder)
    return folder


def arguments(model: Path, output: Path, *more: str) -> list[str]:
    rows = ["--task", "toy", "--train-rows", "48", "--holdout", "16", "--epochs", "0.5"]
    return ["train", "--model", str(model), "--output", str(output), *rows, *more]


def pooling_of(folder: Path) -> str | None:
    return json.loads((folder / "config.json").read_text())["heads"]["pooling"]


def test_encoder_without_a_classifier_gets_exits_that_read_the_mean(encoder, tmp_path, capsys):
    assert main(arguments(encoder, tmp_path / "out")) == 0
    said = capsys.readouterr()
    assert pooling_of(tmp_path / "out") == "mean" and "no trained classifier" in said.out
    assert "LOAD REPORT" not in said.out + said.err
    assert "halting_lr" not in said.out and "--apply auto" in said.out


def test_classifier_keeps_its_head_and_an_option_decides(encoder, tmp_path, capsys):
    toy.toy_model(0, layers=3, hidden=16).save_pretrained(tmp_path / "base")
    toy.toy_tokenizer().save_pretrained(tmp_path / "base")
    assert main(arguments(tmp_path / "base", tmp_path / "out")) == 0
    assert pooling_of(tmp_path / "out") is None and "no trained classifier" not in capsys.readouterr().out
    assert main(arguments(encoder, tmp_path / "own", "--pooling", "family")) == 0
    assert pooling_of(tmp_path / "own") is None


def test_seed_makes_a_training_repeatable(encoder, tmp_path):
    for name in ("first", "second"):
        assert main(arguments(encoder, tmp_path / name, "--seed", "3")) == 0
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert all(first[name].equal(second[name]) for name in first)


def test_model_is_not_overwritten_unless_asked(encoder, tmp_path, capsys):
    assert main(arguments(encoder, tmp_path / "out")) == 0
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert main(arguments(encoder, tmp_path / "out", "--seed", "1")) == 2
    assert "has a model already" in (error := capsys.readouterr().err) and "--overwrite" in error
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert main(arguments(encoder, tmp_path / "out", "--seed", "1", "--overwrite")) == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").depth == 3


def rows(bad):
    """Rows of a model of 3 exits, of which those in `bad` are no better than chance."""
    return SimpleNamespace(trace=SimpleNamespace(depth=3), is_chance=lambda layer: layer in bad)


@pytest.mark.parametrize(
    ("bad", "pooling", "words"),
    [
        ((1, 2), None, "exits 1, 2. Rows cannot leave there; --pooling mean often helps"),
        ((1,), "mean", "exits 1. Rows cannot leave there; give more rows or --epochs"),
        ((1, 3), None, "The last exit is no better than chance"),
    ],
)
def test_exits_at_chance_are_named_with_a_remedy(bad, pooling, words):
    assert words in train._advice(rows(bad), pooling)


def test_nothing_is_said_of_trained_exits():
    assert train._advice(rows(()), None) is None
