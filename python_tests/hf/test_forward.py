"""What `forward`, `trace` and `predict_with_exits` return, and the inputs, labels and models that they refuse."""

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
)

import earlyexit_kernels as ee
from earlyexit_kernels.core.attention import packed_attention
from earlyexit_kernels.core.attention_plan import plan_attention
from earlyexit_kernels.core.packing import pack
from earlyexit_kernels.criteria import Margin, Patience, QExit
from earlyexit_kernels.hf.predict import predict_batches
from earlyexit_kernels.ops import exit_step

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"


# outputs


def test_fields_in_eval_mode():
    """Answers are those of the exit where each row leaves, in request order."""
    model, batch = varied()
    trace, out = model.trace(**batch), model(**batch)
    assert isinstance(out, ee.EarlyExitOutput)
    assert out.loss is None and out.all_logits is None
    assert out.logits.shape == (12, CLASSES) and out.logits.dtype == torch.float32
    for values in (out.exit_layer, out.layers_run):
        assert values.shape == (12,) and values.dtype == torch.int64
    assert len(out.exit_layer.unique()) >= 3 and torch.equal(out.layers_run, out.exit_layer)
    assert not any(value.requires_grad for value in out.values())
    scores, thresholds = entropies(trace.logits), [*model.criterion.threshold, float("inf")]
    for row in range(12):
        layer = next(i for i in range(DEPTH) if scores[row, i] < thresholds[i])
        assert out.exit_layer[row] == layer + 1
        assert (out.logits[row] - trace.logits[row, layer]).abs().max() < 1e-5
    fields = model(**batch, labels=torch.zeros(12, dtype=torch.long), return_dict=False)
    assert isinstance(fields, tuple) and [x.dim() for x in fields] == [0, 2, 1, 1]


def test_all_logits_on_request():
    model, batch = varied()
    plain, out = model(**batch), model(**batch, output_all_logits=True)
    assert out.all_logits.shape == (12, DEPTH, CLASSES)
    assert torch.equal(out.exit_layer, plain.exit_layer)
    assert torch.equal(out.layers_run, torch.full((12,), DEPTH))
    assert (out.logits - plain.logits).abs().max() < 1e-5
    assert torch.equal(out.logits, out.all_logits[torch.arange(12), out.exit_layer - 1])


def test_train_mode_answers_with_the_last_exit():
    """Whatever the criterion is."""
    model, batch = varied(dropout=0.0)
    trace = model.trace(**batch)
    out = model.train()(**batch)
    assert out.loss is None
    assert (out.all_logits - trace.logits).abs().max() < 1e-5
    assert torch.equal(out.logits, out.all_logits[:, -1]) and out.logits.requires_grad
    assert torch.equal(out.exit_layer, torch.full((12,), DEPTH)) and torch.equal(out.layers_run, out.exit_layer)
    with pytest.raises(RuntimeError, match="eval mode"):
        model.trace(**batch)
    model.set_criterion(None)
    again = model(**batch)
    assert torch.equal(again.all_logits, out.all_logits) and torch.equal(again.exit_layer, out.exit_layer)


def task(problem_type, rows=12):
    """Return the number of labels, the labels, and a reference loss."""
    generator = torch.Generator().manual_seed(3)
    if problem_type == REGRESSION:
        labels = torch.randn(rows, generator=generator)
        return 1, labels, lambda z: F.mse_loss(z[:, 0], labels)
    if problem_type == MULTI:
        labels = torch.randint(0, 2, (rows, CLASSES), generator=generator).float()
        return CLASSES, labels, lambda z: F.binary_cross_entropy_with_logits(z, labels)
    labels = torch.randint(0, CLASSES, (rows,), generator=generator)
    return CLASSES, labels, lambda z: F.cross_entropy(z, labels)


RULES = {SINGLE: Patience(patience=1), REGRESSION: Patience(patience=1, tolerance=0.3), MULTI: QExit(q=0.6)}


@pytest.mark.parametrize("problem_type", RULES)
def test_loss(problem_type):
    """That of the answers in eval mode, of all exits in train mode, and of the stock model at full depth."""
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
    base = stock(num_labels=num_labels, problem_type=problem_type)
    expected = base(**batch, labels=labels).loss
    assert torch.allclose(ee.to_early_exit(base)(**batch, labels=labels).loss, expected, atol=1e-6)


def test_ignored_labels_as_in_stock_models():
    base, labels = stock(), torch.tensor([0, -100, 1, -100])
    loss = ee.to_early_exit(base)(**ragged(), labels=labels).loss
    assert torch.allclose(loss, base(**ragged(), labels=labels).loss, atol=1e-6)


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


def test_answers_and_labels_of_all_processes_are_gathered():
    """Here of two that have the same rows."""

    def gather(x):
        return tuple(map(gather, x)) if isinstance(x, tuple) else torch.cat((x, x))

    model, batch = varied()
    got = predict_batches(model, [{**batch, "labels": torch.arange(12)}], gather)
    assert got.labels.tolist() == [*range(12)] * 2 and len(got.logits) == len(got.exit_layer) == 24


# inputs

OF_STOCK = ("inputs_embeds", "head_mask", "past_key_values", "use_cache", "encoder_hidden_states", "cache_position")


def rows_with(**row):
    return lambda model: ee.predict_with_exits(model, [{"input_ids": [5, 6, 7], **row}, {"input_ids": [5, 6], **row}])


CRITERION = r"expected an instance of a criterion, such as .*Entropy\(threshold=0.3\), or None for full depth, got"
REFUSED = [
    *(
        (
            lambda model, name=name: model(**ragged(), **{name: torch.ones(4, 17)}),
            TypeError,
            rf"forward: expected input_ids, .* got {name}; .*pass None",
        )
        for name in OF_STOCK
    ),
    (lambda model: model.set_criterion("entropy"), TypeError, f"criterion: {CRITERION} 'entropy'"),
    (lambda model: model.set_criterion(Margin), TypeError, f"criterion: {CRITERION} the class Margin"),
    (
        lambda model: ee.replay(ee.ExitTrace(torch.zeros(1, 2, 2)), Margin),
        ValueError,
        f"replay: {CRITERION} the class Margin",
    ),
    (
        lambda model: model.configure(compaction="alwys"),
        ValueError,
        r"compaction: expected one of \('auto', 'always', 'never'\), got 'alwys'",
    ),
    (
        lambda model: ee.predict_with_exits("model", []),
        TypeError,
        "expected an early-exit model or a Trainer of one, got str",
    ),
    *(
        (
            lambda model, item=item: ee.predict_with_exits(model, [item]),
            ValueError,
            f"items that are mappings with 'input_ids', {got}; make them",
        )
        for item, got in (("a text", "got str"), ({"text": "a"}, r"got keys \['text'\]"))
    ),
    (
        lambda model: exit_step(
            criterion="entropy",
            layer=1,
            depth=DEPTH,
            row_ids=torch.zeros(1, dtype=torch.int32),
            exit_layer=torch.zeros(1, dtype=torch.int64),
            state=torch.zeros(0, 1),
            answers=torch.zeros(1, CLASSES),
            logits=torch.zeros(1, CLASSES),
        ),
        TypeError,
        r"exit_step: expected an instance of a criterion, such as .*, got 'entropy'",
    ),
    # trainers and files have names of classes; a model counts classes from 0
    (rows_with(labels="bad"), ValueError, r"expected numbers as 'labels', got 'bad'; .* model.config.label2id"),
]


@pytest.mark.parametrize(("call", "error", "words"), REFUSED, ids=[words[:40] for *_, words in REFUSED])
def test_refusals(call, error, words):
    model = early_exit(pooling="mean")
    model.configure(compaction="never")
    with pytest.raises(error, match=words):
        call(model)
    assert model.settings.compaction == "never" and model.criterion is None


@pytest.mark.parametrize("training", [True, False])
def test_none_is_accepted_for_arguments_of_stock_models(training):
    model, batch = early_exit(dropout=0.0).train(training), ragged()
    out = model(**batch, **dict.fromkeys(OF_STOCK), use_peft=False)
    assert torch.equal(out.logits, model(**batch).logits)
    model.eval()
    trace = model.trace(**batch, token_type_ids=None, inputs_embeds=None)
    assert torch.equal(trace.logits, model.trace(**batch).logits)


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_outputs_that_the_config_asks_for_are_refused(name):
    base = stock(attention="eager")
    setattr(base.config, name, True)
    with pytest.raises(ValueError, match=f"{name}=True is not supported"):
        ee.to_early_exit(base)
    model = early_exit()
    setattr(model.config, f"_{name}" if name == "output_attentions" else name, True)
    with pytest.raises(ValueError, match="are not supported"):
        model(**ragged())
    assert model(**ragged(), **{name: False}).logits is not None


# labels


@pytest.mark.parametrize(
    ("problem_type", "labels", "message"),
    [
        (SINGLE, torch.tensor([0, 1, 3, 0]), r"classes in \[0, 2\].*model has 3.*got 3"),
        (SINGLE, torch.tensor([0, -1, 2, 0]), "or -100 for no label, got -1"),
        (SINGLE, torch.tensor([0.0, 1, 2, 0]), "expected integers .*got torch.float32"),
        (SINGLE, torch.zeros(4, 3), r"expected shape \[4\] .*got \[4, 3\]"),
        (SINGLE, torch.tensor([0, 1, 2]), r"expected shape \[4\] .*4 rows.*got \[3\]"),
        (MULTI, torch.tensor([0, 1, 1, 0]), r"expected shape \[4, 3\] .*got \[4\]"),
        (MULTI, torch.full((4, 3), 2), r"expected numbers in \[0, 1\], got 2"),
        (MULTI, torch.full((4, 3), float("nan")), r"expected numbers in \[0, 1\], got nan"),
        (REGRESSION, torch.zeros(4, 2), r"expected shape \[4, 3\] for regression .*got \[4, 2\]"),
        (REGRESSION, torch.full((4, 3), float("inf")), "expected finite numbers, got inf"),
        (REGRESSION, [0.0, 1.0, 2.0, 0.0], "expected a tensor, got list"),
    ],
)
def test_invalid_labels_are_refused(problem_type, labels, message):
    model = early_exit(problem_type=problem_type)
    for training in (True, False):
        with pytest.raises(ValueError, match=rf"^labels: (?=.*{message})"):
            model.train(training)(**ragged(), labels=labels)


@pytest.mark.parametrize(
    ("problem_type", "classes", "labels"),
    [
        (SINGLE, 3, torch.tensor([0, -100, 2, 0])),
        (SINGLE, 3, torch.tensor([[0], [1], [2], [0]], dtype=torch.int32)),
        (MULTI, 3, torch.ones(4, 3, dtype=torch.bool)),
        (MULTI, 3, torch.full((4, 3), 0.05)),
        (REGRESSION, 1, torch.tensor([0, 1, 2, 3])),
        (REGRESSION, 1, torch.zeros(4, 1, dtype=torch.float64)),
        (REGRESSION, 3, torch.zeros(4, 3)),
    ],
)
def test_valid_labels(problem_type, classes, labels):
    model = early_exit(problem_type=problem_type, num_labels=classes)
    for training in (True, False):
        assert torch.isfinite(model.train(training)(**ragged(), labels=labels).loss)


# moved, quantized or replaced parts of a model


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("pooling", "method"), [(None, "joint"), ("mean", "fastbert"), ("mean", "smartbert")])
def test_exits_of_another_dtype_or_device_are_refused(pooling, method, training):
    base = stock()
    model = ee.to_early_exit(base, pooling=pooling, method=method).train(training)
    base.half()
    message = r"the exits are torch.float32 on cpu, the backbone torch.float16 on cpu; convert both with model.to"
    with pytest.raises(ValueError, match=message):
        model(**ragged())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.bfloat16().float()(**ragged())
    model.heads.to("meta")
    with pytest.raises(ValueError, match=r"the exits are torch.float32 on meta, the backbone torch.float32 on cpu"):
        model(**ragged())


def test_quantized_exits_are_refused():
    model, batch = early_exit(), ragged()
    whole = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
    with pytest.raises(TypeError, match=r"expected torch.nn.Linear, got torch.ao.*quantize model.backbone only"):
        whole(**batch)
    model.backbone = torch.ao.quantization.quantize_dynamic(model.backbone, {torch.nn.Linear})
    assert 0 < (model(**batch).logits - early_exit()(**batch).logits).abs().max() < 1


@pytest.mark.parametrize("change", [lambda layers: layers.append(layers[0]), lambda layers: layers.pop(-1)])
def test_backbone_with_another_number_of_layers_is_refused(change):
    model = ee.to_early_exit(stock(), pooling="first")
    batch = batch_for(model)
    model(**batch)
    change(model.backbone.encoder.layer)
    for ask in (model, model.trace, model.train()):
        with pytest.raises(ValueError, match=r"the backbone has \d layers, the model has 4 exits"):
            ask(**batch)
        model.eval()


@pytest.mark.parametrize("argument", ["position_bias", "s_aux", "attention_mask"])
def test_attention_refuses_unsupported_arguments(argument):
    states, plan = torch.randn(1, 2, 5, 4), plan_attention(pack(torch.ones(1, 5), None))
    arguments = {"attention_mask": None, argument: torch.ones(1)}
    with pytest.raises(ValueError, match=f"packed attention supports plan, .* got {argument} from Linear"):
        packed_attention(torch.nn.Linear(1, 1), states, states, states, plan=plan, **arguments)
    out, _ = packed_attention(torch.nn.Linear(1, 1), states, states, states, None, plan=plan, softcap=None)
    assert out.shape == (1, 5, 2, 4)
