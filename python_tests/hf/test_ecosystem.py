"""Use with torch and transformers: precision, copies, compilation, other attention, wrappers."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import transformers as tf
from support.models import (
    ALL_FAMILIES,
    CLASSES,
    RECTANGULAR,
    VARIED_LENGTHS,
    VOCABULARY,
    attentions_of,
    batch_for,
    early_exit,
    entropies,
    stock,
    varied,
    varied_entropy,
)
from torch import nn

import earlyexit_kernels as ee

LABELS = torch.arange(12) % CLASSES


def same(out, expected, tolerance=1e-5):
    assert torch.equal(out.exit_layer, expected.exit_layer)
    assert (out.logits.float() - expected.logits.float()).abs().max() <= tolerance


# other attention


def test_attention_cannot_be_set_on_the_model():
    """`from_config` may build the model with another attention, but only with the packed one."""
    model, batch = varied()
    expected = model(**batch)
    again = tf.AutoModelForSequenceClassification.from_config(model.config, attn_implementation="eager").eval()
    again.load_state_dict(model.state_dict())
    same(again(**batch), expected, 0.0)
    for attention in ("sdpa", "eager", "flash_attention_2", "flex_attention"):
        with pytest.raises(ValueError, match="attn_implementation cannot be chosen"):
            model.set_attn_implementation(attention)
    same(model(**batch), expected, 0.0)


@pytest.mark.sample(4)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_attention_replaced_in_the_backbone_is_refused(family):
    """By `set_attn_implementation`, and in its config."""
    model = early_exit(family)
    batch, packed, fixed = batch_for(model), model.backbone.config._attn_implementation, model.fixed_depth()
    for attention in () if family in RECTANGULAR else attentions_of(family):
        model.backbone.set_attn_implementation(attention)
        for call in (model, model.trace, model.train()):
            with pytest.raises(ee.AttentionReplacedError, match=f"attention to be '{packed}', got '{attention}'"):
                call(**batch)
            model.eval()
    for attention in ("flash_attention_2", "flex_attention", None):
        model.backbone.config._attn_implementation = attention
        for call in (model, model.trace, fixed, model.stream):
            with pytest.raises(ee.AttentionReplacedError, match=f"attention to be '{packed}', got {attention!r}"):
                list(call(**batch))


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
@pytest.mark.parametrize("family", ["bert", "modernbert", "mistral", "deberta-v2"])
def test_attention_of_the_stock_model_is_not_taken_over(family, attention):
    """A stock model on a GPU may have flash attention, which is not what its exits run on."""
    base = stock(family)
    batch, stated = batch_for(base), base.config._attn_implementation
    expected = base(**batch).logits
    base.config._attn_implementation = attention
    model = ee.to_early_exit(base)
    assert (model(**batch).logits - expected).abs().max() <= 1e-5
    assert base.config._attn_implementation == attention != stated


# precision, copies, devices


@pytest.mark.parametrize(
    ("pooling", "halting", "backend"),
    [(None, False, "auto"), (None, True, "torch"), ("first", True, "auto"), ("mean", True, "auto")],
)
def test_autocast(pooling, halting, backend):
    model, batch = varied(pooling=pooling, halting=halting)
    model.configure(backend=backend)
    full = model.trace(**batch).logits
    scores = entropies(full)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(**batch)
        everything = model(**batch, output_all_logits=True)
        trained = model.train()(**batch, labels=LABELS)
    trained.loss.backward()
    assert (everything.all_logits.float() - full).abs().max() < 0.15
    agree = out.exit_layer == model.eval()(**batch).exit_layer
    for row in (~agree).nonzero().flatten():
        at = min(int(out.exit_layer[row]), int(model(**batch).exit_layer[row])) - 1
        assert abs(scores[row, at] - model.criterion.threshold[at]) < 0.1
    assert agree.sum() >= 8
    assert torch.isfinite(trained.loss) and all(p.grad is not None for p in model.parameters())


def test_gradient_modes():
    """Also inputs that were made in inference mode, in it and outside of it."""
    model, batch = varied()
    expected = model(**batch)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            inside = {name: value.clone() for name, value in batch.items()}
            same(model(**batch), expected, 0.0)
            same(model(**inside), expected, 0.0)


def test_deepcopy_is_independent():
    model, batch = varied()
    expected = model(**batch)
    twin = copy.deepcopy(model)
    assert twin.backbone.config is twin.config.backbone_config and twin.config is not model.config
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert not storages & {p.untyped_storage().data_ptr() for p in twin.parameters()}
    same(twin(**batch), expected, 0.0)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.set_criterion(None)
    same(model(**batch), expected, 0.0)
    assert model.criterion is not None and model.config.criterion is not None


@pytest.mark.parametrize(
    ("dtype", "pooling"), [(torch.float16, None), (torch.bfloat16, "first"), (torch.bfloat16, "mean")]
)
def test_half_precision(dtype, pooling):
    model, batch = varied(pooling=pooling)
    full = model.trace(**batch).logits
    model.to(dtype)
    out = model(**batch, output_all_logits=True)
    assert (out.all_logits.float() - full).abs().max() < (0.01 if dtype == torch.float16 else 0.15)
    same(out, model(**batch), 0.05)


def test_moves_reach_the_stock_instance_and_all_parts():
    base = stock()
    model = ee.to_early_exit(base).half()
    assert {p.dtype for p in base.bert.encoder.parameters()} == {torch.float16}
    assert {p.dtype for p in base.classifier.parameters()} == {torch.float32}
    model = model.to("meta")
    assert model.device.type == "meta" and {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.sample(5)
@pytest.mark.parametrize("family", [f for f in ALL_FAMILIES if f not in ("albert", "mpnet")])
def test_gradient_checkpointing(family):
    plain, checkpointed = (early_exit(family, dropout=0.0).train() for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        checkpointed.gradient_checkpointing_enable()
    runs = []
    layer = checkpointed.adapter.layers(checkpointed.backbone)[1]
    first = next(module for module in layer.modules() if isinstance(module, nn.Linear))
    first.register_forward_pre_hook(lambda *_: runs.append(1))
    batch = batch_for(plain, lengths=VARIED_LENGTHS)
    losses = [model(**batch, labels=LABELS).loss for model in (plain, checkpointed)]
    forward = len(runs)  # layers with their own attention run once for each group of rows
    for loss in losses:
        loss.backward()
    assert len(runs) == 2 * forward, "the layer is recomputed in the backward pass"
    assert abs(losses[0] - losses[1]) < 1e-6
    others = dict(checkpointed.named_parameters())
    assert all((p.grad - others[name].grad).abs().max() < 1e-6 for name, p in plain.named_parameters())


def test_gradient_checkpointing_of_albert_is_refused():
    with pytest.raises(ValueError, match="not compatible with gradient checkpointing"):
        early_exit("albert").gradient_checkpointing_enable()


@pytest.mark.thorough
def test_compile_with_graph_breaks():
    """The compiler is `eager`; `test_fixed_depth_graphs` compiles with the inductor."""
    torch._dynamo.reset()
    model = ee.to_early_exit(stock(num_hidden_layers=2), pooling="mean")
    batch = batch_for(model, lengths=VARIED_LENGTHS)
    model.set_criterion(varied_entropy(model.trace(**batch)))
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        assert len(model(**batch).exit_layer.unique()) == 2
        for rows in (slice(0, 12), slice(3, 8)):
            part = {name: value[rows] for name, value in batch.items()}
            same(compiled(**part), model(**part))
    torch._dynamo.reset()


# wrappers and warnings


@pytest.mark.sample(4)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_added_tokens(tmp_path, family):
    """After `resize_token_embeddings` new ids are valid, also after a save and a load."""
    model = early_exit(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.resize_token_embeddings(VOCABULARY + 10)
    batch = batch_for(model)
    batch["input_ids"][0, 3] = VOCABULARY + 5
    expected = model(**batch)
    model.save_pretrained(tmp_path)
    same(tf.AutoModelForSequenceClassification.from_pretrained(tmp_path)(**batch), expected, 0.0)


def test_backend_is_the_one_that_runs():
    model = early_exit()
    usable = ee.available_backends("cpu")
    assert model.explain().backend == ("torch" if usable["cpp"] else "cpp")
    for name, reason in usable.items():
        if reason:
            with pytest.raises(ee.BackendUnavailableError, match=f"backend '{name}' cannot run on cpu tensors: "):
                model.configure(backend=name)
        else:
            model.configure(backend=name)
            assert model.explain().backend == name
    with pytest.raises(ValueError, match=r"backend: expected one of .*got 'numpy'"):
        model.configure(backend="numpy")
