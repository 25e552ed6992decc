"""Conversion of a model with exits to another training method."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.models import batch_for, early_exit, stock

import earlyexit_kernels as ee
from earlyexit_kernels.criteria import Entropy

METHODS = ("joint", "deebert", "berxit", "fastbert", "palbert", "ensemble", "smartbert", "dact")
#: Methods with attention exits; those of SmartBERT have more attention heads.
ATTENTION = {"fastbert", "smartbert"}


def different(method, family="bert", **options):
    """Return a model whose heads all have other weights than new ones."""
    torch.manual_seed(0)
    model = ee.to_early_exit(stock(family, dropout=0.0), method=method, **options).eval()
    with torch.no_grad():
        for parameter in model.heads.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.set_criterion(None)
    return model


def exits_of(model):
    """Return the logits of all exits on a batch at full depth."""
    model.set_criterion(None)
    return model.trace(**batch_for(model)).logits


@pytest.mark.sample(5)
@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(METHODS, 2)))
def test_exits_of_one_form_are_carried(first, second):
    model = different(first)
    other = ee.to_early_exit(model, method=second)
    assert other.method.name == ee.methods.METHODS[second].name and not other.training
    shared = dict(model.backbone.named_parameters())
    assert all(parameter is shared[name] for name, parameter in other.backbone.named_parameters())
    before, after = exits_of(model), exits_of(other)
    carried = torch.equal(before[:, -1], after[:, -1])
    assert carried == (first not in ATTENTION and second not in ATTENTION)
    own = model.heads.config.exit_dense == "own" and other.heads.config.exit_dense == "shared"
    assert torch.equal(before, after) == (carried and not own), "the dense module of the last exit becomes that of all"


@pytest.mark.parametrize("family", ["albert", "distilbert", "roberta"])
def test_other_families(family):
    model = different("joint", family)
    assert torch.equal(exits_of(ee.to_early_exit(model, method="dact")), exits_of(model))


def test_pooling_is_kept():
    model = different("joint", pooling="mean")
    other = ee.to_early_exit(model, method="palbert")
    assert other.heads.config.pooling == "mean" and torch.equal(exits_of(other), exits_of(model))
    with pytest.raises(ValueError, match="exits of this model have pooling='mean', got pooling='first'"):
        ee.to_early_exit(model, method="palbert", pooling="first")


def test_halting_outputs_of_one_form_are_carried():
    model = different("palbert")
    same = ee.to_early_exit(model, method=ee.methods.Palbert(beta=0.05))
    weights = model.heads.halting.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in same.heads.halting.state_dict().items())
    single = different(ee.methods.Palbert(halting_input="single"))
    other = ee.to_early_exit(single, method=ee.methods.Palbert(halting_input="diff"))
    first, second = (m.heads.halting.state_dict() for m in (single, other))
    assert {name: value.shape for name, value in first.items()} == {name: value.shape for name, value in second.items()}
    assert not any(torch.equal(first[name], second[name]) for name in first)


def test_heads_are_copies_and_the_criterion_is_that_of_the_method():
    model = different("joint")
    model.set_criterion(Entropy(threshold=0.3))
    other = ee.to_early_exit(model, method="dact")
    assert other.criterion.name == "dact" and model.criterion == Entropy(threshold=0.3)
    before = exits_of(model)
    with torch.no_grad():
        other.heads.out[0].weight.zero_()
    assert torch.equal(exits_of(model), before)


def test_labels_problem_type_and_dtype_are_kept(tmp_path):
    model = early_exit(num_labels=1).to(torch.float64)
    model.config.id2label = {0: "score"}
    other = ee.to_early_exit(model, method="deebert")
    assert other.problem_type == "regression" and other.dtype == torch.float64 == other.heads.out[0].weight.dtype
    assert other.config.id2label == {0: "score"}
    other.save_pretrained(tmp_path)
    loaded = ee.EarlyExitForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(exits_of(loaded), exits_of(other))
