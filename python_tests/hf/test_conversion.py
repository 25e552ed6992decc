"""`to_early_exit`: shared parameters, the unchanged stock model, and refused arguments."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
import transformers as tf
from support.models import ALL_FAMILIES, CLASSES, attentions_of, batch_for, early_exit, encoder_of, holes_of, stock
from torch import nn

import earlyexit_kernels as ee
from earlyexit_kernels.backbones import adapter_of
from earlyexit_kernels.core.attention import PACKED_ATTENTION


def test_registering_twice():
    importlib.reload(ee)
    config = early_exit().config
    assert tf.AutoConfig.for_model("early-exit").__class__ is ee.EarlyExitConfig
    model = tf.AutoModelForSequenceClassification.from_config(config)
    assert type(model) is ee.EarlyExitForSequenceClassification
    assert model.backbone.config._attn_implementation == PACKED_ATTENTION


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_encoder_parameters_are_the_same_objects(family):
    base = stock(family)
    model = ee.to_early_exit(base)
    mine = dict(model.backbone.named_parameters())
    theirs = {n: p for n, p in encoder_of(base).named_parameters() if not n.startswith("pooler.")}
    assert mine.keys() == theirs.keys()
    assert all(mine[name] is theirs[name] for name in theirs)
    assert not {id(p) for p in model.heads.parameters()} & {id(p) for p in base.parameters()}
    modules = {id(m) for m in base.modules()}
    assert not [name for name, m in model.named_modules() if id(m) in modules]


@pytest.mark.sample(3)
@pytest.mark.parametrize(("family", "attention"), [(f, a) for f in ALL_FAMILIES for a in attentions_of(f)])
def test_stock_instance_is_unchanged(family, attention):
    base = stock(family, attention=attention)
    batch = batch_for(base, holes_of(family))
    state = {name: value.clone() for name, value in base.state_dict().items()}
    config, modules = base.config.to_dict(), [(name, m.training) for name, m in base.named_modules()]
    logits = base(**batch).logits
    model = ee.to_early_exit(base)
    for _ in range(2):  # after the conversion, and again after the new model has run
        assert (base(**batch).logits - logits).abs().max() <= 1e-6
        assert base.config._attn_implementation == attention
        assert encoder_of(base).config._attn_implementation == attention
        assert base.config.to_dict() == config
        assert [(name, m.training) for name, m in base.named_modules()] == modules
        now = base.state_dict()
        assert now.keys() == state.keys() and all(torch.equal(now[name], state[name]) for name in state)
        model(**batch)
    if attention == "eager":
        attentions = base(**batch, output_attentions=True).attentions
        assert len(attentions) == 4 and attentions[0] is not None


def test_stock_instance_still_ignores_padding():
    base = stock()
    batch = batch_for(base, "right")
    ee.to_early_exit(base)(**batch)
    alone = base(input_ids=batch["input_ids"][1:2, :3]).logits
    assert (base(**batch).logits[1:2] - alone).abs().max() < 1e-5


@pytest.mark.parametrize("training", [True, False])
def test_train_flag_follows_the_instance(training):
    base = stock().train(training)
    model = ee.to_early_exit(base)
    assert all(m.training is training for m in model.modules())
    assert all(m.training is training for m in base.modules())


def test_nested_config_is_a_deep_copy():
    base = stock()
    model = ee.to_early_exit(base)
    nested = model.config.backbone_config
    assert model.backbone.config is nested and nested is not base.config
    nested.layer_norm_eps = 7.0
    model.config.label2id["new"] = 9
    model.config.id2label[9] = "new"
    assert base.config.layer_norm_eps != 7.0
    assert "new" not in base.config.label2id and 9 not in base.config.id2label


def test_config_of_the_caller_is_unchanged():
    inner = stock().config
    assert inner._attn_implementation == "sdpa"
    outer = ee.EarlyExitConfig(backbone_config=inner)
    assert inner._attn_implementation == "sdpa" and outer.backbone_config is not inner


def test_labels_and_problem_type_are_kept():
    base = stock(num_labels=2)
    base.config.id2label, base.config.label2id = {0: "no", 1: "yes"}, {"no": 0, "yes": 1}
    config = ee.to_early_exit(base).config
    assert config.id2label == {0: "no", 1: "yes"} and config.label2id == {"no": 0, "yes": 1}
    assert config.problem_type == "single_label_classification" and base.config.problem_type is None
    assert ee.to_early_exit(stock(num_labels=1)).config.problem_type == "regression"
    several = stock(problem_type="multi_label_classification")
    assert ee.to_early_exit(several).config.problem_type == "multi_label_classification"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_is_kept(dtype):
    model = ee.to_early_exit(stock().to(dtype), pooling="mean", halting=True)
    assert model.dtype == dtype and {p.dtype for p in model.parameters()} == {dtype}
    assert model.config.dtype == dtype


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_exits_start_from_the_stock_head(family):
    base = stock(family)
    out = base.get_submodule(adapter_of(family).head.out)
    bias = torch.zeros(CLASSES) if out.bias is None else out.bias
    own = ee.to_early_exit(base)
    copies = own.heads.out if len(own.heads.dense) else own.heads.out[-1:]
    assert all(torch.equal(head.weight, out.weight) and torch.equal(head.bias, bias) for head in copies)
    mean = ee.to_early_exit(base, pooling="mean")
    assert torch.equal(mean.heads.out[-1].weight, out.weight)
    assert not torch.equal(mean.heads.out[0].weight, out.weight)


def test_replaced_module_is_not_initialised_again():
    base = stock()
    by_hand = nn.Linear(96, 64)
    assert not getattr(by_hand, "_is_hf_initialized", False)
    base.bert.encoder.layer[2].output.dense = by_hand
    weight, bias = by_hand.weight.detach().clone(), by_hand.bias.detach().clone()
    batch = batch_for(base)
    expected = base(**batch).logits
    model = ee.to_early_exit(base)
    assert torch.equal(by_hand.weight, weight) and torch.equal(by_hand.bias, bias)
    assert model.backbone.encoder.layer[2].output.dense.weight is by_hand.weight
    assert (model(**batch).logits - expected).abs().max() < 1e-5


def test_unsupported_family_lists_the_supported_ones():
    config = tf.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=20, bos_token_id=0, eos_token_id=0)
    with pytest.raises(ValueError, match="gpt2") as caught:
        ee.to_early_exit(tf.GPT2ForSequenceClassification(config))
    assert all(family in str(caught.value) for family in ALL_FAMILIES)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_bare_encoder_is_refused(family):
    with pytest.raises(TypeError, match=r"sequence classification.*AutoModelForSequenceClassification"):
        ee.to_early_exit(encoder_of(stock(family)))


@pytest.mark.parametrize(
    "model_class",
    [tf.BertForMaskedLM, tf.BertForTokenClassification, tf.BertForMultipleChoice, tf.BertForNextSentencePrediction],
)
def test_model_of_another_task_is_refused(model_class):
    with pytest.raises(TypeError, match="sequence classification"):
        ee.to_early_exit(model_class(stock().config))


@pytest.mark.parametrize("thing", ["google-bert/bert-base-uncased", nn.Linear(2, 2), None])
def test_other_objects_are_refused(thing):
    with pytest.raises(TypeError, match="to_early_exit: expected"):
        ee.to_early_exit(thing)


def test_chunked_feed_forward_is_refused():
    with pytest.raises(ValueError, match="chunk_size_feed_forward"):
        ee.to_early_exit(stock(chunk_size_feed_forward=2))


def test_causal_encoder_is_refused():
    """Packed attention is bidirectional, so the answers of a decoder would differ."""
    with pytest.raises(ValueError, match="is_decoder"):
        ee.to_early_exit(stock(is_decoder=True))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "hunch"}, ValueError, "method: expected one of .*joint.*got 'hunch'"),
        ({"pooling": "max"}, ValueError, r"pooling: expected one of \(None, 'mean', 'first'\) .*got 'max'"),
        ({"criterion": "entropy"}, TypeError, "criterion: expected .*got 'entropy'"),
        (
            {"criterion": ee.criteria.QExit(q=0.5)},
            ValueError,
            "needs heads with the output 'halting'.*method='palbert'",
        ),
    ],
)
def test_invalid_argument_is_named(arguments, error, message):
    base = stock()
    with pytest.raises(error, match=message):
        ee.to_early_exit(base, **arguments)


def test_two_conversions_are_independent():
    base = stock()
    first, second = ee.to_early_exit(base), ee.to_early_exit(base)
    first.set_criterion(ee.criteria.Entropy(threshold=10.0))
    with torch.no_grad():
        first.heads.out[0].weight.zero_()
    assert second.criterion is None and second.config.criterion is None
    assert torch.equal(second.heads.out[0].weight, base.classifier.weight)


def test_conversion_of_a_deep_copy_shares_nothing():
    base = stock()
    model = ee.to_early_exit(copy.deepcopy(base))
    assert not {id(p) for p in model.parameters()} & {id(p) for p in base.parameters()}
