"""Changes of the method or phase of a model, and training on a batch without rows."""

from __future__ import annotations

import pytest
import torch
from support.models import batch_for, stock

import earlyexit_kernels as ee
from earlyexit_kernels.methods import METHODS

TINY = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("made_for", "asked", "words"),
    [
        ("joint", "fastbert", "'form': 'attention'"),
        ("joint", "deebert", "'exit_dense': 'own'"),
        ("joint", "dact", "'halting': True"),
        ("fastbert", "smartbert", "'attention_heads': 4"),
        ("palbert", ee.methods.Palbert(halting_input="diff"), "'halting_input': 'diff'"),
    ],
)
def test_method_refuses_exits_of_another_shape(made_for, asked, words):
    model = ee.to_early_exit(stock("bert", **TINY), method=made_for)
    before = model.config.method
    with pytest.raises(ValueError, match="trains exits with") as caught:
        next(ee.phases(model, asked))
    assert words in str(caught.value) and model.config.method == before


def test_method_accepts_compatible_exits():
    """Sharing is irrelevant without a dense module; halting heads may be unused."""
    pooled = ee.to_early_exit(stock("bert", **TINY), pooling="mean")
    assert [phase.name for phase in ee.phases(pooled, "deebert")] == ["backbone", "exits"]
    halting = ee.to_early_exit(stock("bert", **TINY), method="palbert")
    assert [phase.name for phase in ee.phases(halting, "joint")] == ["joint"]
    dact = ee.to_early_exit(stock("bert", **TINY), method=ee.methods.Dact(halting_bias=-1.0))
    assert [phase.name for phase in ee.phases(dact, "dact")] == ["exits", "dact"]
    assert dact.method == ee.methods.Dact() and dact.config.method == ee.methods.Dact().to_dict()


@pytest.mark.parametrize("phase", [-1, 1, 7])
def test_unknown_phase_is_refused(phase):
    model = ee.to_early_exit(stock("bert", **TINY))
    with pytest.raises(ValueError, match=f"has phases 0 to 0, got {phase}"):
        model.schedule.enter(model, phase)
    assert model.schedule.phase is not None and model.schedule.phase.name == "joint"


@pytest.mark.parametrize("name", METHODS)
def test_loss_of_an_empty_batch_is_zero(name):
    model = ee.to_early_exit(stock("bert", **TINY), method=name).train()
    empty = {key: values[:0] for key, values in batch_for(model, lengths=(3, 5)).items()}
    for _ in ee.phases(model):
        model.train().schedule.set_progress(0, 0.0)
        loss = model(**empty, labels=torch.zeros(0, dtype=torch.long)).loss
        loss.backward()
        assert loss.item() == 0.0


@pytest.mark.parametrize(("method", "form"), [("fastbert", "linear"), ("joint", "attention")])
def test_form_of_the_exits_is_chosen_at_conversion(method, form, tmp_path):
    model = ee.to_early_exit(stock("bert", **TINY), method=method, pooling="mean", form=form)
    assert model.heads.config.form == form and bool(len(model.heads.attention)) == (form == "attention")
    names = [phase.name for phase in ee.phases(model)]
    model.save_pretrained(tmp_path)
    loaded = ee.EarlyExitForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.heads.config.form == form and [phase.name for phase in ee.phases(loaded)] == names


def test_form_that_a_method_cannot_train_is_refused():
    with pytest.raises(ValueError, match="expected form='attention'"):
        ee.to_early_exit(stock("bert", **TINY), method="smartbert", form="linear")
    with pytest.raises(ValueError, match="form"):
        ee.to_early_exit(stock("bert", **TINY), form="convolution")
