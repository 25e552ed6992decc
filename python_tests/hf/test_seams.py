"""Unusual arguments, labels, moved or quantized weights, and backbones that do not fit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers as tf
from support.models import CLASSES, DEPTH, batch_for, early_exit, ragged, stock

import earlyexit_kernels as ee
from earlyexit_kernels.backbones import BACKBONES
from earlyexit_kernels.core.attention import packed_attention
from earlyexit_kernels.core.attention_plan import plan_attention
from earlyexit_kernels.core.packing import pack
from earlyexit_kernels.ops import exit_step

OF_STOCK = ("inputs_embeds", "head_mask", "past_key_values", "use_cache", "encoder_hidden_states", "cache_position")
LABELS = torch.tensor([2, 0, 1, 1])


@pytest.mark.parametrize("training", [True, False])
def test_none_is_accepted_for_arguments_of_stock_models(training):
    model, batch = early_exit(dropout=0.0).train(training), ragged()
    out = model(**batch, **dict.fromkeys(OF_STOCK), use_peft=False)
    assert torch.equal(out.logits, model(**batch).logits)
    model.eval()
    trace = model.trace(**batch, token_type_ids=None, inputs_embeds=None)
    assert torch.equal(trace.logits, model.trace(**batch).logits)


@pytest.mark.parametrize("name", OF_STOCK)
def test_other_arguments_are_refused_by_name(name):
    with pytest.raises(TypeError, match=rf"forward: expected input_ids, .* got {name}; .*pass None"):
        early_exit()(**ragged(), **{name: torch.ones(4, 17)})


# masks


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8, torch.float32, torch.float16])
def test_additive_masks_of_any_dtype_are_refused(dtype):
    model, batch = early_exit(pooling="mean"), ragged()
    mask = ((batch["attention_mask"] - 1) * 100).to(dtype)
    with pytest.raises(ValueError, match="attention_mask: expected 1 for a token and 0 for none, got negative numbers"):
        model(input_ids=batch["input_ids"], attention_mask=mask)


def test_nan_in_a_mask_is_refused():
    batch = ragged()
    mask = batch["attention_mask"].float()
    mask[2, 4] = float("nan")
    with pytest.raises(ValueError, match="attention_mask: expected 1 for a token and 0 for none, got NaN"):
        early_exit(pooling="mean")(input_ids=batch["input_ids"], attention_mask=mask)


# labels


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("problem_type", "labels", "message"),
    [
        ("single_label_classification", torch.tensor([0, 1, 3, 0]), r"classes in \[0, 2\].*model has 3.*got 3"),
        ("single_label_classification", torch.tensor([0, -1, 2, 0]), "or -100 for no label, got -1"),
        ("single_label_classification", torch.tensor([0.0, 1, 2, 0]), "expected integers .*got torch.float32"),
        ("single_label_classification", torch.zeros(4, 3), r"expected shape \[4\] .*got \[4, 3\]"),
        ("single_label_classification", torch.tensor([0, 1, 2]), r"expected shape \[4\] .*4 rows.*got \[3\]"),
        ("multi_label_classification", torch.tensor([0, 1, 1, 0]), r"expected shape \[4, 3\] .*got \[4\]"),
        ("multi_label_classification", torch.full((4, 3), 2), r"expected numbers in \[0, 1\], got 2"),
        ("multi_label_classification", torch.full((4, 3), float("nan")), r"expected numbers in \[0, 1\], got nan"),
        ("regression", torch.zeros(4, 2), r"expected shape \[4, 3\] for regression .*got \[4, 2\]"),
        ("regression", torch.full((4, 3), float("inf")), "expected finite numbers, got inf"),
        ("regression", [0.0, 1.0, 2.0, 0.0], "expected a tensor, got list"),
    ],
)
def test_invalid_labels_are_refused(problem_type, labels, message, training):
    model = early_exit(problem_type=problem_type).train(training)
    with pytest.raises(ValueError, match=rf"^labels: (?=.*{message})"):
        model(**ragged(), labels=labels)


@pytest.mark.parametrize(
    ("problem_type", "classes", "labels"),
    [
        ("single_label_classification", 3, torch.tensor([0, -100, 2, 0])),
        ("single_label_classification", 3, torch.tensor([[0], [1], [2], [0]], dtype=torch.int32)),
        ("multi_label_classification", 3, torch.ones(4, 3, dtype=torch.bool)),
        ("multi_label_classification", 3, torch.full((4, 3), 0.05)),
        ("regression", 1, torch.tensor([0, 1, 2, 3])),
        ("regression", 1, torch.zeros(4, 1, dtype=torch.float64)),
        ("regression", 3, torch.zeros(4, 3)),
    ],
)
def test_valid_labels(problem_type, classes, labels):
    model = early_exit(problem_type=problem_type, num_labels=classes)
    for training in (True, False):
        assert torch.isfinite(model.train(training)(**ragged(), labels=labels).loss)


# moved or quantized weights


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("pooling", "method"), [(None, "joint"), ("mean", "fastbert"), ("mean", "smartbert")])
def test_exits_of_another_dtype_are_refused(pooling, method, training):
    base = stock()
    model = ee.to_early_exit(base, pooling=pooling, method=method).train(training)
    base.half()
    message = r"the exits are torch.float32 on cpu, the backbone torch.float16 on cpu; convert both with model.to"
    with pytest.raises(ValueError, match=message):
        model(**ragged())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.bfloat16().float()(**ragged())


def test_exits_on_another_device_are_refused():
    model = early_exit(pooling="mean")
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


def test_criterion_names_are_refused():
    expected = r"expected an instance of a criterion, such as .*Entropy\(threshold=0.3\),"
    with pytest.raises(TypeError, match=rf"criterion: {expected} or None for full depth, got 'entropy'"):
        early_exit().set_criterion("entropy")
    with pytest.raises(TypeError, match=rf"criterion: {expected} or None for full depth, got the class Margin"):
        early_exit().set_criterion(ee.criteria.Margin)
    with pytest.raises(ValueError, match=rf"replay: {expected} or None for full depth, got the class Margin"):
        ee.replay(ee.ExitTrace(torch.zeros(1, 2, 2)), ee.criteria.Margin)
    logits = torch.zeros(1, CLASSES)
    with pytest.raises(TypeError, match=r"exit_step: expected an instance of a criterion, such as .*, got 'entropy'"):
        exit_step(
            criterion="entropy",
            layer=1,
            depth=DEPTH,
            row_ids=torch.zeros(1, dtype=torch.int32),
            state=torch.zeros(0, 1),
            answers=torch.zeros(1, CLASSES),
            exit_layer=torch.zeros(1, dtype=torch.int64),
            logits=logits,
        )


def test_unknown_compaction_is_refused():
    model = early_exit()
    model.configure(compaction="never")
    with pytest.raises(ValueError, match=r"compaction: expected one of \('auto', 'always', 'never'\), got 'alwys'"):
        model.configure(compaction="alwys")
    assert model.settings.compaction == "never"


def test_conversion_of_a_large_module_gives_a_short_message():
    with pytest.raises(TypeError, match="got Sequential; load it") as caught:
        ee.to_early_exit(torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(50))))
    assert len(str(caught.value)) < 200


# backbones that do not fit


@pytest.mark.parametrize("argument", ["position_bias", "s_aux", "attention_mask"])
def test_attention_refuses_unsupported_arguments(argument):
    states, plan = torch.randn(1, 2, 5, 4), plan_attention(pack(torch.ones(1, 5), None))
    given = {"attention_mask": None, argument: torch.ones(1)}
    with pytest.raises(ValueError, match=f"packed attention supports plan, .* got {argument} from Linear"):
        packed_attention(torch.nn.Linear(1, 1), states, states, states, plan=plan, **given)
    out, _ = packed_attention(torch.nn.Linear(1, 1), states, states, states, None, plan=plan, softcap=None)
    assert out.shape == (1, 5, 2, 4)


def test_backbone_with_unknown_parts_is_refused(monkeypatch):
    """RoBERTa-PreLayerNorm has the names of RoBERTa and a final norm that its adapter does not apply."""
    family = "roberta-prelayernorm"
    adapter = dataclasses.replace(BACKBONES["roberta"], model_type=family, base="roberta_prelayernorm")
    monkeypatch.setitem(BACKBONES, family, adapter)
    base = stock(family, pad_token_id=1)
    assert isinstance(base, tf.RobertaPreLayerNormForSequenceClassification)
    with pytest.raises(ValueError, match=r"does not use LayerNorm of RobertaPreLayerNormModel.*exit_norm"):
        ee.to_early_exit(base)
    base.base_model.LayerNorm = torch.nn.Identity()
    batch = batch_for(base)
    assert torch.allclose(ee.to_early_exit(base)(**batch).logits, base(**batch).logits, atol=1e-5)


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
