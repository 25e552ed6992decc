"""A ModernBERT and a Qwen3 of small width, from random weights to answers: train, calibrate, load, pipeline."""

from __future__ import annotations

import shutil

import pytest
import torch
import transformers as tf
from support.commands import error_of

import earlyexit_kernels as ee
from earlyexit_cli import main
from earlyexit_kernels.cli.saved import Record
from earlyexit_kernels.data import toy
from earlyexit_kernels.data.table import write_table

SIZES = {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 96, "max_position_embeddings": 128}
FAMILIES = {
    "modernbert": {"num_hidden_layers": 6, "local_attention": 8, "global_attn_every_n_layers": 3},
    "qwen3": {"num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 12},
}
TRAINING = ["--holdout", "200", "--epochs", "5", "--lr", "3e-3", "--seed", "0"]


@pytest.fixture(scope="module", params=FAMILIES)
def base(request, tmp_path_factory):
    """Folder with a random model of a family and the tokenizer of the toy task."""
    folder, tokenizer = tmp_path_factory.mktemp(request.param), toy.toy_tokenizer()
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.sep_token_id}
    sizes = {**SIZES, **FAMILIES[request.param], "vocab_size": len(tokenizer), "initializer_range": 0.1}
    torch.manual_seed(0)
    config = tf.AutoConfig.for_model(request.param, **sizes, **ids)
    tf.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A file of 3,200 generated rows."""
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    written = toy.write_splits(train_rows=32_000)["train"]
    written = [row for row in written if row.level <= 3][:3200]
    write_table(path, {"text": [row.text for row in written], "label": [row.label for row in written]})
    return path


@pytest.mark.thorough
def test_learns_exits_early_and_answers_in_a_pipeline(base, rows, tmp_path):
    arguments = ["train", str(base), "--data", str(rows), "--output", str(tmp_path / "out"), *TRAINING]
    assert main([*arguments, "--pooling", "family"]) == 0
    record = Record.load(tmp_path / "out")
    assert record.scores[-1]["accuracy"] > 0.9
    assert main(["calibrate", str(tmp_path / "out"), "--max-drop", "0.05", "--criterion", "entropy"]) == 0
    model = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = [row.text for row in toy.write_splits(train_rows=0)["dev"][:24]]
    table = ee.Scorer(model, tokenizer)(texts)
    assert sum(table["exit_layer"]) / len(texts) < model.depth - 0.5
    for size in (1, 8):
        pipe = tf.pipeline(
            "text-classification", model=model, tokenizer=tokenizer, pipeline_class=ee.ExitPipeline, batch_size=size
        )
        found = pipe(list(texts))
        assert [one["exit_layer"] for one in found] == table["exit_layer"]
        assert [one["label"] for one in found] == table["label"]


@pytest.mark.sample(2)
def test_a_tokenizer_without_padding_is_refused_or_gets_the_end_token(base, rows, tmp_path, capsys):
    tokenizer = tf.AutoTokenizer.from_pretrained(base)
    for end in ("[SEP]", None):
        folder = tmp_path / str(end)
        shutil.copytree(base, folder)
        tokenizer.pad_token, tokenizer.eos_token = None, end
        tokenizer.save_pretrained(folder)
        data = ["--data", str(rows), "--epochs", "0.02"]
        command = ["train", str(folder), *data, "--output", str(tmp_path / f"out-{end}")]
        if "qwen3" in str(base) and end:
            assert main(command) == 0 and "padded with its end token, [SEP]" in capsys.readouterr().out
        else:
            assert "its tokenizer has n" in error_of(capsys, command)
