"""A truncated model answers as the whole one under a fixed cut, also after it was saved and loaded."""

from __future__ import annotations

import pytest
import torch
from support.models import ALL_FAMILIES, DEPTH, batch_for, early_exit

import earlyexit_kernels as ee
from earlyexit_kernels.criteria import Entropy, FixedLayer


@pytest.mark.sample(4)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_truncated_model_answers_like_a_fixed_cut(family, tmp_path):
    model = early_exit(family, criterion=Entropy(threshold=0.1))
    batch = batch_for(model)
    smaller = model.truncate(2)
    assert smaller.depth == 2 and smaller.criterion is None and not smaller.training and model.criterion is not None
    model.set_criterion(FixedLayer(layer=2))
    expected = model(**batch)
    smaller.save_pretrained(tmp_path)
    for found in (smaller, ee.EarlyExitForSequenceClassification.from_pretrained(tmp_path)):
        out = found(**batch)
        assert out.exit_layer.tolist() == expected.exit_layer.tolist() == [2] * len(out.logits)
        assert torch.allclose(out.logits, expected.logits, atol=1e-5)
        if model.explain().path == "fused" and family == "bert":
            assert torch.equal(out.logits, expected.logits)


@pytest.mark.parametrize("method", ["palbert", "berxit", "smartbert"])
def test_exits_of_every_form_are_copied(method):
    model = early_exit(method=method)
    smaller, batch = model.truncate(3), batch_for(model)
    model.set_criterion(None)
    found, whole = smaller.trace(**batch), model.trace(**batch)
    assert torch.allclose(found.logits, whole.logits[:, :3], atol=1e-5)
    assert set(found.aux) == set(whole.aux)
    assert all(torch.allclose(found.aux[name], whole.aux[name][:, :3], atol=1e-5) for name in found.aux)


def test_weights_are_copies_and_train():
    model = early_exit()
    smaller = model.truncate(1).train()
    before = model.heads.out[0].weight.clone()
    batch = batch_for(smaller)
    smaller(**batch, labels=torch.zeros(len(batch["input_ids"]), dtype=torch.long)).loss.backward()
    assert smaller.heads.out[0].weight.grad is not None and model.heads.out[0].weight.grad is None
    torch.optim.SGD(smaller.parameters(), lr=1.0).step()
    assert torch.equal(model.heads.out[0].weight, before) and not torch.equal(smaller.heads.out[0].weight, before)


@pytest.mark.parametrize("layers", [0, DEPTH + 1, True, 1.0])
def test_layers_out_of_range_are_refused(layers):
    with pytest.raises(ValueError, match=f"truncate: expected a number of layers from 1 to {DEPTH}, got"):
        early_exit().truncate(layers)


def test_groups_of_layers_that_would_be_others_are_refused():
    model = early_exit("albert", num_hidden_groups=2, num_hidden_layers=6)
    with pytest.raises(ValueError, match="stand for others in a model of 4 layers; expected a multiple of 3"):
        model.truncate(4)
    assert model.truncate(3).config.backbone_config.num_hidden_groups == 1
