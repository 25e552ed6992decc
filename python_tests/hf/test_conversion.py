"""`to_early_exit`: shared parameters, the unchanged stock model, conversion to another method, and what is refused."""

from __future__ import annotations

import dataclasses
import importlib
import itertools

import pytest
import torch
import transformers as tf
from support.models import ALL_FAMILIES, CLASSES, attentions_of, batch_for, early_exit, encoder_of, holes_of, stock
from torch import nn

import earlyexit_kernels as ee
from earlyexit_kernels.backbones import BACKBONES, StockHead, adapter_of
from earlyexit_kernels.backbones.forms_bert import read_bert_layer
from earlyexit_kernels.core.attention import PACKED_ATTENTION
from earlyexit_kernels.criteria import Patience, QExit
from earlyexit_kernels.hf import convert
from earlyexit_kernels.methods import METHODS, Palbert

every_family = pytest.mark.parametrize("family", ALL_FAMILIES)


def test_registering_twice():
    importlib.reload(ee)
    config = early_exit().config
    assert tf.AutoConfig.for_model("early-exit").__class__ is ee.EarlyExitConfig
    model = tf.AutoModelForSequenceClassification.from_config(config)
    assert type(model) is ee.EarlyExitForSequenceClassification
    assert model.backbone.config._attn_implementation == PACKED_ATTENTION


# what is shared with the stock model, and what is not


@every_family
def test_the_encoder_is_shared_and_exits_start_from_the_stock_head(family):
    base = stock(family)
    model = ee.to_early_exit(base)
    mine = dict(model.backbone.named_parameters())
    theirs = {n: p for n, p in encoder_of(base).named_parameters() if not n.startswith("pooler.")}
    assert mine.keys() == theirs.keys()
    assert all(mine[name] is theirs[name] for name in theirs)
    buffers = dict(encoder_of(base).named_buffers())
    assert all(buffer is buffers[name] for name, buffer in model.backbone.named_buffers())
    assert not {id(p) for p in model.heads.parameters()} & {id(p) for p in base.parameters()}
    modules = {id(m) for m in base.modules()}
    assert not [name for name, m in model.named_modules() if id(m) in modules]
    out = base.get_submodule(adapter_of(family).head.out)
    bias = torch.zeros(CLASSES) if out.bias is None else out.bias
    copies = model.heads.out if len(model.heads.dense) else model.heads.out[-1:]
    assert all(torch.equal(head.weight, out.weight) and torch.equal(head.bias, bias) for head in copies)
    mean = ee.to_early_exit(base, pooling="mean")
    assert torch.equal(mean.heads.out[-1].weight, out.weight)
    assert not torch.equal(mean.heads.out[0].weight, out.weight)


def test_exits_are_on_the_device_of_the_stock_head(monkeypatch):
    for reads_values in ("check_separation", "_copy_stock"):
        monkeypatch.setattr(convert, reads_values, lambda *_: None)
    model = ee.to_early_exit(stock().to("meta"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


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


def test_configs_are_deep_copies():
    base = stock()
    model = ee.to_early_exit(base)
    nested = model.config.backbone_config
    assert model.backbone.config is nested and nested is not base.config
    nested.layer_norm_eps = 7.0
    model.config.label2id["new"] = 9
    model.config.id2label[9] = "new"
    assert base.config.layer_norm_eps != 7.0
    assert "new" not in base.config.label2id and 9 not in base.config.id2label
    outer = ee.EarlyExitConfig(backbone_config=base.config)
    assert base.config._attn_implementation == "sdpa" and outer.backbone_config is not base.config


def test_labels_and_problem_type_are_kept():
    base = stock(num_labels=2)
    base.config.id2label, base.config.label2id = {0: "no", 1: "yes"}, {"no": 0, "yes": 1}
    config = ee.to_early_exit(base).config
    assert config.id2label == {0: "no", 1: "yes"} and config.label2id == {"no": 0, "yes": 1}
    assert config.problem_type == "single_label_classification" and base.config.problem_type is None
    assert ee.to_early_exit(stock(num_labels=1)).config.problem_type == "regression"
    several = stock(problem_type="multi_label_classification")
    assert ee.to_early_exit(several).config.problem_type == "multi_label_classification"


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


@pytest.mark.sample(3)
@every_family
def test_every_family_fits_in_train_mode_and_half_precision(family):
    assert ee.to_early_exit(stock(family, dropout=0.5).train()).training
    model = ee.to_early_exit(stock(family).to(torch.bfloat16), pooling="mean", halting=True)
    assert model.dtype == model.config.dtype == torch.bfloat16 and {p.dtype for p in model.parameters()} == {
        model.dtype
    }
    assert torch.isfinite(model(**batch_for(model)).logits).all()


# settings of the config that change after the conversion: followed as in the stock model, or refused by name


def doubled(heads):
    return 2 * heads


def rolled(types):
    return [*types[1:], types[0]]


@pytest.mark.parametrize("layers", ["auto", "eager"])
@pytest.mark.parametrize(
    ("family", "name", "change"),
    [
        *((family, "num_attention_heads", doubled) for family in ("bert", "roberta", "albert", "electra")),
        ("distilbert", "n_heads", doubled),
        ("modernbert", "layer_types", rolled),  # read to make masks only
    ],
)
def test_layers_keep_what_they_were_made_with(family, name, change, layers):
    """As in the stock model, whose modules read the config when they are made."""
    model = early_exit(family)
    model.configure(path=layers)
    batch, config = batch_for(model), model.backbone.config
    before = model.trace(**batch).logits
    setattr(config, name, change(getattr(config, name)))
    assert torch.equal(model.trace(**batch).logits, before)
    for part in model.adapter.parts(model.adapter.layers(model.backbone)[0]) if change is doubled else ():
        assert 2 * read_bert_layer(part, model.adapter.names, config).heads == getattr(config, name)


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gemma3_text"])
def test_other_types_of_layers_are_refused(family):
    model = early_exit(family)
    batch, config = batch_for(model), model.backbone.config
    model(**batch)
    old = list(config.layer_types)
    number = old.index("sliding_attention")
    config.layer_types = [*old[:number], "full_attention", *old[number + 1 :]]
    words = rf"layer {number + 1} was made as 'sliding_attention', layer_types in the config now says 'full_attention'"
    for call in (model, model.trace, model.fixed_depth()):
        with pytest.raises(ValueError, match=words):
            call(**batch)
    config.layer_types = old
    model(**batch)


@pytest.mark.parametrize("number", [2, 5])
def test_another_number_of_labels_is_refused(number):
    """In the config of the model, which is not that of its backbone."""
    model = early_exit("bert")
    batch = batch_for(model)
    model.backbone.config.num_labels = 7
    old = model(**batch).logits.shape[1]
    model.config.num_labels = number
    words = f"the config has {number} labels, the exits have {old}; set config.num_labels back"
    for call in (model, model.trace):
        with pytest.raises(ValueError, match=words):
            call(**batch)
    with pytest.raises(ValueError, match=words):
        model.train()(**batch)
    model.config.num_labels = old
    assert model.eval()(**batch).logits.shape[1] == old


# a model with exits to another method

#: Methods with attention exits; those of SmartBERT have more attention heads.
ATTENTION = {"fastbert", "smartbert"}
NAMES = [name for name in METHODS if name != "pabee"]


def different(method, *, pooling=None, num_labels=CLASSES):
    """Return a model whose heads all have other weights than new ones."""
    torch.manual_seed(0)
    model = ee.to_early_exit(stock(dropout=0.0, num_labels=num_labels), method=method, pooling=pooling).eval()
    with torch.no_grad():
        for parameter in model.heads.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def exits_of(model):
    """Return the logits of all exits on a batch at full depth."""
    model.set_criterion(None)
    return model.trace(**batch_for(model)).logits


@pytest.mark.sample(5)
@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(NAMES, 2)))
def test_exits_of_one_form_are_carried(first, second):
    model = different(first)
    other = ee.to_early_exit(model, method=second)
    assert other.method.name == METHODS[second].name and not other.training
    shared = dict(model.backbone.named_parameters())
    assert all(parameter is shared[name] for name, parameter in other.backbone.named_parameters())
    before, after = exits_of(model), exits_of(other)
    carried = torch.equal(before[:, -1], after[:, -1])
    assert carried == (first not in ATTENTION and second not in ATTENTION)
    of_last = model.heads.config.exit_dense == "own" and other.heads.config.exit_dense == "shared"
    assert torch.equal(before, after) == (carried and not of_last), "the dense module of the last exit becomes all's"


def test_what_a_model_with_exits_keeps(tmp_path):
    """Pooling, labels, problem type and dtype; heads are copies, and the criterion is that of the method."""
    model = different("joint", pooling="mean", num_labels=1).to(torch.float64)
    model.config.id2label = {0: "score"}
    model.set_criterion(Patience(patience=1, tolerance=0.1))
    other = ee.to_early_exit(model, method="palbert")
    assert other.criterion is None and model.criterion == Patience(patience=1, tolerance=0.1)
    assert ee.to_early_exit(different("joint"), method="dact").criterion.name == "dact"
    assert other.heads.config.pooling == "mean" and other.config.id2label == {0: "score"}
    assert other.problem_type == "regression" and other.dtype == torch.float64 == other.heads.out[0].weight.dtype
    before = exits_of(model)
    assert torch.equal(exits_of(other), before)
    other.save_pretrained(tmp_path)
    loaded = ee.EarlyExitForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(exits_of(loaded), before)
    with torch.no_grad():
        other.heads.out[0].weight.zero_()
    assert torch.equal(exits_of(model), before)
    with pytest.raises(ValueError, match="exits of this model have pooling='mean', got pooling='first'"):
        ee.to_early_exit(model, method="palbert", pooling="first")


def test_halting_outputs_of_one_form_are_carried():
    model = different("palbert")
    same = ee.to_early_exit(model, method=Palbert(beta=0.05))
    weights = model.heads.halting.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in same.heads.halting.state_dict().items())
    single = different(Palbert(halting_input="single"))
    other = ee.to_early_exit(single, method=Palbert(halting_input="diff"))
    first, second = (m.heads.halting.state_dict() for m in (single, other))
    assert {name: value.shape for name, value in first.items()} == {name: value.shape for name, value in second.items()}
    assert not any(torch.equal(first[name], second[name]) for name in first)


# refused


@every_family
def test_bare_encoder_is_refused(family):
    with pytest.raises(TypeError, match=r"sequence classification.*AutoModelForSequenceClassification"):
        ee.to_early_exit(encoder_of(stock(family)))


class MixedByMean(nn.Module):
    """A layer that adds the mean of all tokens to each."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden, plan):
        return self.inner(hidden, plan=plan)[0] + hidden.mean(dim=1, keepdim=True)


def mixing_layer():
    base = stock()
    base.bert.encoder.layer[2] = MixedByMean(base.bert.encoder.layer[2])
    return base


def gpt2():
    config = tf.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=20, bos_token_id=0, eos_token_id=0)
    return tf.GPT2ForSequenceClassification(config)


def longrope(kind):
    base = stock("llama")
    base.config.rope_parameters = {**base.config.rope_parameters, "rope_type": kind, "factor": 2.0}
    return base


OTHER_TASKS = (tf.BertForMaskedLM, tf.BertForTokenClassification, tf.BertForMultipleChoice)
#: What is converted, the arguments of the conversion, and the error.
REFUSED = [
    (gpt2, {}, ValueError, "gpt2.*" + ".*".join(sorted(ALL_FAMILIES))),
    *((lambda cls=cls: cls(stock().config), {}, TypeError, "sequence classification") for cls in OTHER_TASKS),
    *(
        (lambda thing=thing: thing, {}, TypeError, "to_early_exit: expected")
        for thing in ("google-bert/bert-base-uncased", nn.Linear(2, 2), None)
    ),
    # a short message
    (lambda: nn.Sequential(*(nn.Linear(2, 2) for _ in range(50))), {}, TypeError, "^.{,80}got Sequential; load.{,80}$"),
    (lambda: stock(chunk_size_feed_forward=2), {}, ValueError, "chunk_size_feed_forward"),
    # packed attention is bidirectional, so the answers of a decoder would differ
    (lambda: stock(is_decoder=True), {}, ValueError, "is_decoder"),
    (stock, {"method": "hunch"}, ValueError, "method: expected one of .*joint.*got 'hunch'"),
    (stock, {"pooling": "max"}, ValueError, r"pooling: expected one of \(None, 'mean', 'first'\) .*got 'max'"),
    (stock, {"pooling": "last"}, ValueError, r"one of \(None, 'mean', 'first'\) for a bert model, got 'last'"),
    (stock, {"criterion": "entropy"}, TypeError, "criterion: expected .*got 'entropy'"),
    (stock, {"criterion": QExit(q=0.5)}, ValueError, "needs heads with the output 'halting'.*method='palbert'"),
    (stock, {"method": "smartbert", "form": "linear"}, ValueError, "expected form='attention'"),
    (stock, {"form": "convolution"}, ValueError, "form"),
    (mixing_layer, {}, ValueError, "adapter of 'bert' does not fit: the rows of a batch affect each other in Mix"),
    *(
        (lambda kind=kind: longrope(kind), {}, ValueError, f"rope_type '{kind}' is not supported: its angles depend on")
        for kind in ("dynamic", "longrope")
    ),
    (
        lambda: stock("eurobert", classifier_pooling="cls"),
        {},
        ValueError,
        r"classifier_pooling: expected one of \('bos', 'mean', 'late'\), got 'cls'",
    ),
    (
        lambda: stock("deberta-v2", conv_kernel_size=3, conv_act="gelu"),
        {},
        ValueError,
        "conv_kernel_size=3 of this DeBERTa is not supported",
    ),
]


@pytest.mark.parametrize(("make", "arguments", "error", "words"), REFUSED, ids=[words[:50] for *_, words in REFUSED])
def test_refusals(make, arguments, error, words):
    with pytest.raises(error, match=words):
        ee.to_early_exit(make(), **arguments)


NAMES_ONLY = {"rectangle_arguments": None, "layer_arguments": None}
#: Family, wrong fields of its adapter, and words of the refusal.
WRONG_ADAPTERS = [
    # MPNet takes the plan and ignores it, DeBERTa does not take it, Llama lacks its rotary embeddings
    ("mpnet", NAMES_ONLY, "the rows of a batch affect each other in MPNetLayer.*rectangle_arguments"),
    ("deberta-v2", NAMES_ONLY, "DebertaV2Layer cannot run on packed rows: .*plan"),
    ("llama", NAMES_ONLY, "LlamaDecoderLayer cannot run on packed rows"),
    (
        "llama",
        {"head": dataclasses.replace(BACKBONES["llama"].head, pooling="first")},
        "layers are causal.*give its StockHead pooling='last'",
    ),
    ("llama", {"base": "modle"}, "the adapter of 'llama' does not fit LlamaForSequenceClassification.* has no modle"),
    ("llama", {"head": StockHead(dense=None, pooling="last")}, "which has no classifier"),
    ("llama", {"embeddings": "embeddings"}, "the adapter of 'llama' does not fit LlamaModel: .*embeddings"),
    ("llama", {"exit_norm": lambda backbone: backbone.final}, "does not fit LlamaModel: .*final"),
]


@pytest.mark.parametrize(("family", "changes", "words"), WRONG_ADAPTERS)
def test_adapters_that_do_not_fit_are_refused(family, changes, words, monkeypatch):
    monkeypatch.setitem(BACKBONES, family, dataclasses.replace(BACKBONES[family], **changes))
    with pytest.raises(ValueError, match=words):
        ee.to_early_exit(stock(family))
    with pytest.raises(ValueError, match=r"StockHead\(pooling=...\): expected one of .*, got 'tail'"):
        StockHead(dense=None, pooling="tail")


def test_a_backbone_with_a_part_that_its_adapter_does_not_use_is_refused(monkeypatch):
    """RoBERTa-PreLayerNorm has the names of RoBERTa and a final norm that its adapter does not apply."""
    family = "roberta-prelayernorm"
    adapter = dataclasses.replace(BACKBONES["roberta"], model_type=family, base="roberta_prelayernorm")
    monkeypatch.setitem(BACKBONES, family, adapter)
    base = stock(family, pad_token_id=1)
    with pytest.raises(ValueError, match=r"does not use LayerNorm of RobertaPreLayerNormModel.*exit_norm"):
        ee.to_early_exit(base)
    base.base_model.LayerNorm = nn.Identity()
    batch = batch_for(base)
    assert torch.allclose(ee.to_early_exit(base)(**batch).logits, base(**batch).logits, atol=1e-5)


def test_the_check_of_the_rows_draws_no_random_numbers(monkeypatch):
    states = []
    for check in (convert.check_separation, lambda view: None):
        monkeypatch.setattr(convert, "check_separation", check)
        torch.manual_seed(3)
        ee.to_early_exit(stock(dropout=0.5).train())
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
