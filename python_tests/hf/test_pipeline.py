"""`pipeline("text-classification")` with an early-exit model."""

from __future__ import annotations

import pytest
import transformers as tf
from support.models import TEXTS, stock, tokenizer, varied_entropy

import earlyexit_kernels as ee


def stock_of_a_tokenizer():
    return stock(vocab_size=len(tokenizer())), tokenizer()


@pytest.mark.parametrize("batch_size", [1, 8])
def test_pipeline_equals_stock_at_full_depth(batch_size):
    base, words = stock_of_a_tokenizer()
    base.config.id2label = {0: "low", 1: "middle", 2: "high"}
    pipe = tf.pipeline("text-classification", model=base, tokenizer=words)
    expected = pipe(list(TEXTS), batch_size=batch_size, top_k=None)
    ours = tf.pipeline("text-classification", model=ee.to_early_exit(base), tokenizer=words)
    pipe.model = ee.to_early_exit(pipe.model)
    for got in (
        ours(list(TEXTS), batch_size=batch_size, top_k=None),
        pipe(list(TEXTS), batch_size=batch_size, top_k=None),
    ):
        for one, other in zip(got, expected, strict=True):
            assert [x["label"] for x in one] == [x["label"] for x in other]
            assert [x["score"] for x in one] == pytest.approx([x["score"] for x in other], abs=1e-6)
    assert {x["label"] for row in expected for x in row} == {"low", "middle", "high"}


def test_pipeline_with_exits_from_files(tmp_path):
    base, words = stock_of_a_tokenizer()
    model = ee.to_early_exit(base, pooling="mean")
    batch = words(list(TEXTS), padding=True, return_tensors="pt")
    model.set_criterion(varied_entropy(model.trace(**batch)))
    out = model(**batch)
    assert len(out.exit_layer.unique()) >= 3
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    for batch_size in (1, 8):
        pipe = tf.pipeline("text-classification", model=str(tmp_path), batch_size=batch_size)
        got = pipe(list(TEXTS))
        best = out.logits.softmax(-1).max(-1)
        assert [x["label"] for x in got] == [f"LABEL_{i}" for i in best.indices]
        assert [x["score"] for x in got] == pytest.approx(best.values.tolist(), abs=1e-5)
