"""The outputs of `forward` and `trace`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.models import (
    CLASSES,
    DEPTH,
    VARIED_LENGTHS,
    batch_for,
    early_exit,
    entropies,
    ragged,
    rows_of,
    stock,
    varied,
    varied_entropy,
)

import earlyexit_kernels as ee


def test_fields_in_eval_mode():
    model, batch = varied()
    out = model(**batch)
    assert isinstance(out, ee.EarlyExitOutput)
    assert out.loss is None and out.all_logits is None
    assert out.logits.shape == (12, CLASSES) and out.logits.dtype == torch.float32
    for field in (out.exit_layer, out.layers_run):
        assert field.shape == (12,) and field.dtype == torch.int64
    assert len(out.exit_layer.unique()) >= 3 and out.exit_layer.min() >= 1 and out.exit_layer.max() <= DEPTH
    assert torch.equal(out.layers_run, out.exit_layer)
    assert not any(value.requires_grad for value in out.values())


def test_logits_are_those_of_the_exit_in_request_order():
    model, batch = varied()
    trace, out = model.trace(**batch), model(**batch)
    scores = entropies(trace.logits)
    thresholds = [*model.criterion.threshold, float("inf")]
    for row in range(12):
        layer = next(i for i in range(DEPTH) if scores[row, i] < thresholds[i])
        assert out.exit_layer[row] == layer + 1
        assert (out.logits[row] - trace.logits[row, layer]).abs().max() < 1e-5


def test_all_logits_on_request():
    model, batch = varied()
    plain, out = model(**batch), model(**batch, output_all_logits=True)
    assert out.all_logits.shape == (12, DEPTH, CLASSES)
    assert torch.equal(out.exit_layer, plain.exit_layer)
    assert torch.equal(out.layers_run, torch.full((12,), DEPTH))
    assert (out.logits - plain.logits).abs().max() < 1e-5
    answering = out.all_logits[torch.arange(12), out.exit_layer - 1]
    assert torch.equal(out.logits, answering)


def test_tuple_on_request():
    model, batch = varied()
    out = model(**batch, labels=torch.zeros(12, dtype=torch.long), return_dict=False)
    assert isinstance(out, tuple) and [x.dim() for x in out] == [0, 2, 1, 1]


def test_all_fields_but_logits_are_ignored_by_the_trainer():
    fields = set(ee.EarlyExitOutput.__dataclass_fields__) - {"loss", "logits"}
    assert set(early_exit().config.keys_to_ignore_at_inference) == fields


def test_train_mode_answers_with_the_last_exit():
    model, batch = varied(dropout=0.0)
    trace = model.trace(**batch)
    out = model.train()(**batch)
    assert out.loss is None
    assert (out.all_logits - trace.logits).abs().max() < 1e-5
    assert torch.equal(out.logits, out.all_logits[:, -1]) and out.logits.requires_grad
    assert torch.equal(out.exit_layer, torch.full((12,), DEPTH))
    assert torch.equal(out.layers_run, out.exit_layer)


def task(problem_type, rows=12):
    """Return the number of labels, the labels, and a reference loss."""
    generator = torch.Generator().manual_seed(3)
    if problem_type == "regression":
        labels = torch.randn(rows, generator=generator)
        return 1, labels, lambda z: F.mse_loss(z[:, 0], labels)
    if problem_type == "multi_label_classification":
        labels = torch.randint(0, 2, (rows, CLASSES), generator=generator).float()
        return CLASSES, labels, lambda z: F.binary_cross_entropy_with_logits(z, labels)
    labels = torch.randint(0, CLASSES, (rows,), generator=generator)
    return CLASSES, labels, lambda z: F.cross_entropy(z, labels)


RULES = {
    "single_label_classification": ee.criteria.Patience(patience=1),
    "regression": ee.criteria.Patience(patience=1, tolerance=0.3),
    "multi_label_classification": ee.criteria.QExit(q=0.6),
}


@pytest.mark.parametrize("problem_type", RULES)
def test_loss(problem_type):
    num_labels, labels, loss_of = task(problem_type)
    model = early_exit(num_labels=num_labels, problem_type=problem_type, halting=True, dropout=0.0)
    model.set_criterion(RULES[problem_type])
    batch = batch_for(model, lengths=VARIED_LENGTHS)
    out = model(**batch, labels=labels)
    assert out.exit_layer.min() < DEPTH
    assert torch.allclose(out.loss, loss_of(out.logits), atol=1e-6)
    assert abs(out.loss - loss_of(model.trace(**batch).logits[:, -1])) > 1e-3, "differs from the loss of the last exit"
    train = model.train()(**batch, labels=labels)
    exits = [loss_of(train.all_logits[:, j]) * (j + 1) for j in range(DEPTH)]
    assert torch.allclose(train.loss, sum(exits) / 10, atol=1e-6)


def test_stock_loss_at_full_depth():
    for problem_type in RULES:
        num_labels, labels, _ = task(problem_type, rows=4)
        base = stock(num_labels=num_labels, problem_type=problem_type)
        batch = ragged()
        model = ee.to_early_exit(base)
        assert torch.allclose(model(**batch, labels=labels).loss, base(**batch, labels=labels).loss, atol=1e-6)


def test_ignored_labels_as_in_stock_models():
    base, labels = stock(), torch.tensor([0, -100, 1, -100])
    loss = ee.to_early_exit(base)(**ragged(), labels=labels).loss
    assert torch.allclose(loss, base(**ragged(), labels=labels).loss, atol=1e-6)


def test_trace_and_replay_agree_with_the_model():
    model, batch = varied(halting=True)
    trace = model.trace(**batch, labels=torch.zeros(12))
    assert trace.logits.shape == (12, DEPTH, CLASSES) and trace.aux["halting"].shape == (12, DEPTH)
    for criterion in (model.criterion, ee.criteria.Patience(patience=2), ee.criteria.QExit(q=0.7), None):
        model.set_criterion(criterion)
        out, (logits, exit_layer) = model(**batch), ee.replay(trace, criterion)
        assert torch.equal(out.exit_layer, exit_layer)
        assert (out.logits - logits).abs().max() < 1e-5
    with pytest.raises(RuntimeError, match="eval mode"):
        model.train().trace(**batch)


@pytest.mark.parametrize("pooling", [None, "first", "mean"])
@pytest.mark.parametrize("halting", [False, True])
def test_trace_of_a_half_precision_model_is_float32(halting, pooling):
    model = early_exit(pooling=pooling, halting=halting).to(torch.bfloat16)
    batch = batch_for(model, lengths=VARIED_LENGTHS)
    trace = model.trace(**batch)
    assert trace.logits.dtype == torch.float32
    criteria = [varied_entropy(trace), ee.criteria.Patience(patience=1)]
    for criterion in criteria + [ee.criteria.QExit(q=0.6)] * halting:
        model.set_criterion(criterion)
        out, (logits, exit_layer) = model(**batch), ee.replay(trace, criterion)
        assert torch.equal(out.exit_layer, exit_layer)
        assert (out.logits.float() - logits).abs().max() < 1e-4, "the same products without intermediate rounding"


def test_trace_of_an_empty_batch_can_be_concatenated():
    model, batch = early_exit().to(torch.bfloat16), ragged()
    none = model.trace(**{name: value[:0] for name, value in batch.items()})
    some = model.trace(**batch)
    assert none.logits.dtype == some.logits.dtype
    assert torch.equal(ee.ExitTrace.cat([some, none]).logits, some.logits)


def test_predict_with_exits_on_a_model():
    model, batch = varied()
    labels = torch.arange(12) % CLASSES
    data = rows_of(batch, labels)
    model.train()
    got = ee.predict_with_exits(model, data, batch_size=5)
    assert model.training
    out = model.eval()(**batch)
    assert (got.exit_layer == out.exit_layer.numpy()).all() and (got.layers_run == out.layers_run.numpy()).all()
    assert got.logits.shape == (12, CLASSES) and abs(got.logits - out.logits.numpy()).max() < 1e-5
    assert (got.labels == labels.numpy()).all()
    bare = ee.predict_with_exits(model, [{"input_ids": row["input_ids"].tolist()} for row in data], batch_size=12)
    assert (bare.exit_layer == got.exit_layer).all() and bare.labels is None
    none = ee.predict_with_exits(model, [])
    assert none.logits.shape == (0, CLASSES) and none.exit_layer.shape == (0,)
    with pytest.raises(TypeError, match="expected an early-exit model or a Trainer"):
        ee.predict_with_exits("model", data)
    for item, said in (("a text", "got str"), ({"text": "a"}, r"got keys \['text'\]")):
        with pytest.raises(ValueError, match=f"items that are mappings with 'input_ids', {said}; make them"):
            ee.predict_with_exits(model, [item])


def test_names_as_labels_are_refused():
    """Trainers and files have names of classes; a model counts classes from 0."""
    model = early_exit("bert")
    rows = [{"input_ids": [5, 6, 7], "labels": "positive"}, {"input_ids": [5, 6], "labels": "negative"}]
    with pytest.raises(ValueError, match=r"expected numbers as 'labels', got 'positive'; .* model.config.label2id"):
        ee.calibrate(model.eval(), rows, target=ee.MaxDrop(0.01))
