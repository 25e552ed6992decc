"""The stock Trainer: evaluation, gradient accumulation, custom losses, checkpoints."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.models import CLASSES, DEPTH, TEXTS, early_exit, stock, tokenizer, varied_entropy
from support.trainers import ROWS, batch_of, dataset, logged_losses, trainer

import earlyexit_kernels as ee


def varied():
    model = early_exit(dropout=0.0)
    inputs = {name: value for name, value in batch_of(dataset()).items() if name != "labels"}
    model.set_criterion(varied_entropy(model.trace(**inputs)))
    return model, inputs


def test_evaluation_returns_arrays_and_exits_on_request(tmp_path):
    model, inputs = varied()
    labels = batch_of(dataset())["labels"]
    out = model(**inputs, labels=labels)
    assert len(out.exit_layer.unique()) >= 3

    def accuracy(prediction):
        assert isinstance(prediction.predictions, np.ndarray) and prediction.predictions.shape == (ROWS, CLASSES)
        return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean()}

    run = trainer(model, tmp_path, compute_metrics=accuracy)
    got = run.predict(dataset())
    assert isinstance(got.predictions, np.ndarray) and got.predictions.shape == (ROWS, CLASSES)
    assert abs(got.predictions - out.logits.numpy()).max() < 1e-5
    logits, exit_layer, layers_run = trainer(model, tmp_path).predict(dataset(), ignore_keys=["all_logits"]).predictions
    assert logits.shape == (ROWS, CLASSES), "exits are returned on request"
    assert (exit_layer == out.exit_layer.numpy()).all() and (layers_run == out.layers_run.numpy()).all()
    metrics = run.evaluate(dataset())
    assert metrics["eval_accuracy"] == pytest.approx((out.logits.argmax(-1) == labels).float().mean().item())
    assert metrics["eval_loss"] == pytest.approx(out.loss.item(), abs=1e-5)


@pytest.mark.parametrize("label", ["labels", "label"])
def test_predict_with_exits_on_a_trainer(tmp_path, label):
    model, inputs = varied()
    out = model(**inputs)
    model.train()
    got = ee.predict_with_exits(trainer(model, tmp_path), dataset(label=label))
    assert model.training
    assert (got.exit_layer == out.exit_layer.numpy()).all() and (got.layers_run == out.layers_run.numpy()).all()
    assert got.logits.shape == (ROWS, CLASSES) and abs(got.logits - out.logits.numpy()).max() < 1e-5
    assert (got.labels == batch_of(dataset())["labels"].numpy()).all()
    with pytest.raises(TypeError, match="early-exit model or a Trainer of one"):
        ee.predict_with_exits(trainer(stock(), tmp_path), dataset())


def trained(tmp_path, **arguments):
    model = early_exit(dropout=0.0)
    run = trainer(model, tmp_path, dataset(16), **arguments)
    run.train()
    return model, logged_losses(run)


def test_gradient_accumulation(tmp_path):
    whole, losses = trained(tmp_path, per_device_train_batch_size=16, gradient_accumulation_steps=1)
    parts, again = trained(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=4)
    first = early_exit(dropout=0.0).train()(**batch_of(dataset(16))).loss.item()
    assert losses[0] == pytest.approx(first, abs=2e-4) and len(losses) == 3
    assert losses == pytest.approx(again, abs=2e-4)
    state = early_exit(dropout=0.0).state_dict()
    for name, value in whole.state_dict().items():
        assert (value - parts.state_dict()[name]).abs().max() < 1e-6, name
        # the gradient of a key's bias is zero up to rounding, since it shifts all scores of a query
        assert name.endswith("key.bias") or not torch.equal(value, state[name]), name


def test_label_smoothing(tmp_path):
    """The Trainer removes the labels and reads `logits`, in train mode those of the last exit."""
    model, losses = trained(tmp_path, label_smoothing_factor=0.1)
    start = early_exit(dropout=0.0).train()
    batch = batch_of(dataset(16))
    labels = batch.pop("labels")
    expected = F.cross_entropy(start(**batch).logits, labels, label_smoothing=0.1)
    assert losses[0] == pytest.approx(expected.item(), abs=2e-4) and losses[-1] < losses[0]
    assert not torch.equal(model.heads.out[-1].weight, start.heads.out[-1].weight)


def test_custom_loss_function(tmp_path):
    seen = []

    def loss(outputs, labels, num_items_in_batch=None):
        seen.append(outputs["all_logits"].shape)
        exits = outputs["all_logits"].transpose(0, 1)
        return sum(F.cross_entropy(z, labels) for z in exits) / DEPTH

    _, losses = trained(tmp_path, compute_loss_func=loss)
    assert seen == [(16, DEPTH, CLASSES)] * 3
    start = early_exit(dropout=0.0).train()(**batch_of(dataset(16)))
    labels = batch_of(dataset(16))["labels"]
    expected = sum(F.cross_entropy(start.all_logits[:, j], labels) for j in range(DEPTH)) / DEPTH
    assert losses[0] == pytest.approx(expected.item(), abs=2e-4) and losses[-1] < losses[0]


def test_texts_through_a_tokenizer(tmp_path):
    """Rows of different lengths, padded by the Trainer's collator, with evaluation and the best model at the end."""
    words = tokenizer()
    data = [{**words(text), "label": i % CLASSES} for i, text in enumerate(TEXTS)]
    model = ee.to_early_exit(stock(vocab_size=len(words), dropout=0.0), criterion=ee.criteria.Patience(patience=1))
    run = trainer(
        model,
        tmp_path,
        data,
        processing_class=words,
        eval_dataset=data,
        per_device_eval_batch_size=4,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    run.train()
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert len(losses) == 2
    assert run.evaluate()["eval_loss"] == pytest.approx(min(losses), abs=1e-6)
    got = ee.predict_with_exits(run, data)
    batch = words(list(TEXTS), padding=True, return_tensors="pt")
    out = model.eval()(**batch)
    assert (got.exit_layer == out.exit_layer.numpy()).all() and abs(got.logits - out.logits.numpy()).max() < 1e-5
    assert (got.labels == [row["label"] for row in data]).all()
    bare = ee.predict_with_exits(model, data, batch_size=3)
    assert (bare.exit_layer == got.exit_layer).all() and (bare.labels == got.labels).all()


def test_column_names_the_trainer_keeps():
    """The Trainer drops columns that `forward` does not name, and treats names with "label" as labels."""
    from transformers.utils import find_labels

    assert find_labels(ee.EarlyExitForSequenceClassification) == ["labels"]
    assert ee.EarlyExitForSequenceClassification.accepts_loss_kwargs is False
