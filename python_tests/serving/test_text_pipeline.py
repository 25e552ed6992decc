"""`pipeline("text-classification", pipeline_class=ExitPipeline)`: the pipeline's own answers, and the exit layer."""

from __future__ import annotations

import pytest
import transformers as tf
from support.models import TEXTS, stock, tokenizer, varied_entropy
from transformers.pipelines import PIPELINE_REGISTRY

import earlyexit_kernels as ee


def model_with_exits(**sizes):
    """Return a model, a tokenizer, and the output for `TEXTS`, which leave at three layers or more."""
    words = tokenizer()
    model = ee.to_early_exit(stock(vocab_size=len(words), **sizes), pooling="mean")
    batch = words(list(TEXTS), padding=True, return_tensors="pt")
    if sizes.get("num_labels", 3) > 1 and "problem_type" not in sizes:
        model.set_criterion(varied_entropy(model.trace(**batch)))
    return model, words, model(**batch)


def without_layer(answer):
    if isinstance(answer, list):
        return [without_layer(one) for one in answer]
    return {name: answer[name] for name in ("label", "score")}


@pytest.mark.parametrize("options", [{}, {"top_k": None}, {"top_k": 1}, {"top_k": 2}, {"function_to_apply": "none"}])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_answers_are_those_of_transformers_with_the_exit_layer(options, batch_size):
    model, words, out = model_with_exits()
    assert len(out.exit_layer.unique()) >= 3
    plain = tf.pipeline("text-classification", model=model, tokenizer=words)
    ours = tf.pipeline("text-classification", model=model, tokenizer=words, pipeline_class=ee.ExitPipeline)
    expected = plain(list(TEXTS), batch_size=batch_size, **options)
    found = ours(list(TEXTS), batch_size=batch_size, **options)
    assert without_layer(found) == expected
    for row, layer in zip(found, out.exit_layer.tolist(), strict=True):
        answers = row if isinstance(row, list) else [row]
        assert [answer["exit_layer"] for answer in answers] == [layer] * len(answers)


def test_one_text_and_pairs():
    model, words, out = model_with_exits()
    classify = tf.pipeline("text-classification", model=model, tokenizer=words, pipeline_class=ee.ExitPipeline)
    (one,) = classify(TEXTS[0])
    assert one["exit_layer"] == int(out.exit_layer[0])
    pair = classify({"text": TEXTS[0], "text_pair": TEXTS[1]})
    layer = model(**words(TEXTS[0], TEXTS[1], return_tensors="pt")).exit_layer
    assert pair["exit_layer"] == int(layer[0])


@pytest.mark.parametrize("sizes", [{"num_labels": 1}, {"problem_type": "multi_label_classification"}])
def test_regression_and_several_labels(sizes):
    model, words, out = model_with_exits(**sizes)
    criterion = ee.criteria.Patience(patience=1, tolerance=0.5) if sizes.get("num_labels") == 1 else None
    model.set_criterion(criterion)
    out = model(**words(list(TEXTS), padding=True, return_tensors="pt"))
    plain = tf.pipeline("text-classification", model=model, tokenizer=words)
    ours = tf.pipeline("text-classification", model=model, tokenizer=words, pipeline_class=ee.ExitPipeline)
    for options in ({}, {"top_k": None}):
        found = ours(list(TEXTS), batch_size=4, **options)
        assert without_layer(found) == plain(list(TEXTS), batch_size=4, **options)
        layers = [(row[0] if isinstance(row, list) else row)["exit_layer"] for row in found]
        assert layers == out.exit_layer.tolist()


def test_as_a_registered_task_and_from_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(PIPELINE_REGISTRY, "supported_tasks", dict(PIPELINE_REGISTRY.supported_tasks))
    model, words, out = model_with_exits()
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    PIPELINE_REGISTRY.register_pipeline(
        "exit-classification", ee.ExitPipeline, pt_model=tf.AutoModelForSequenceClassification
    )
    classify = tf.pipeline("exit-classification", model=str(tmp_path))
    assert [answer["exit_layer"] for answer in classify(list(TEXTS), batch_size=8)] == out.exit_layer.tolist()


def test_a_stock_model_is_refused():
    words = tokenizer()
    with pytest.raises(TypeError, match="expected an early-exit model, got a BertForSequenceClassification"):
        base = stock(vocab_size=len(words))
        tf.pipeline("text-classification", model=base, tokenizer=words, pipeline_class=ee.ExitPipeline)


def test_a_model_in_train_mode_is_refused():
    model, words, out = model_with_exits()
    classify = tf.pipeline("text-classification", model=model, tokenizer=words, pipeline_class=ee.ExitPipeline)
    model.train()
    with pytest.raises(RuntimeError, match=r"expected the model in eval mode, got train mode; call model.eval\(\)"):
        classify(list(TEXTS))
    model.eval()
    assert [answer["exit_layer"] for answer in classify(list(TEXTS), batch_size=8)] == out.exit_layer.tolist()
