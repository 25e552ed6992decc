"""Settings of the config that a user changes after conversion: followed as in the stock model, or refused by name."""

from __future__ import annotations

import pytest
import torch
from support.models import batch_for, early_exit

from earlyexit_kernels.backbones.forms_bert import read_bert_layer


@pytest.mark.parametrize("layers", ["auto", "eager"])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "albert", "electra"])
def test_layers_keep_the_heads_that_they_were_made_with(family, layers):
    """As in the stock model, whose modules read their number when they are made."""
    model = early_exit(family)
    model.configure(path=layers)
    batch, config = batch_for(model), model.backbone.config
    before, name = model.trace(**batch).logits, "n_heads" if family == "distilbert" else "num_attention_heads"
    setattr(config, name, 2 * getattr(config, name))
    assert torch.equal(model.trace(**batch).logits, before)
    for part in model.adapter.parts(model.adapter.layers(model.backbone)[0]):
        own = read_bert_layer(part, model.adapter.names, config)
        assert 2 * own.heads == getattr(config, name)


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


@pytest.mark.parametrize("layers", ["auto", "eager"])
def test_layers_that_know_their_type_keep_it(layers):
    """As in the stock model of ModernBERT, which reads the types of the config to make masks only."""
    model = early_exit("modernbert")
    model.configure(path=layers)
    batch, config = batch_for(model), model.backbone.config
    before = model.trace(**batch).logits
    config.layer_types = list(reversed(config.layer_types[1:])) + config.layer_types[:1]
    assert torch.equal(model.trace(**batch).logits, before)


@pytest.mark.parametrize("number", [2, 5])
def test_another_number_of_labels_is_refused(number):
    model = early_exit("bert")
    batch = batch_for(model)
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


def test_labels_of_the_backbone_do_not_matter():
    """The config of the early-exit model is its own."""
    model = early_exit("bert")
    batch = batch_for(model)
    before = model(**batch).logits
    model.backbone.config.num_labels = 7
    assert torch.equal(model(**batch).logits, before)
