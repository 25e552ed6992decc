"""Choosing another method or phase for a model that is there, and a batch without rows."""

from __future__ import annotations

import pytest
import torch
from support.models import batch_for, stock

import earlyexit_kernels as ee
from earlyexit_kernels.objectives import OBJECTIVES

TINY = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("made_for", "asked", "words"),
    [
        ("joint", "fastbert", "'form': 'attention'"),
        ("joint", "deebert", "'exit_dense': 'own'"),
        ("joint", "dact", "'halting': True"),
        ("fastbert", "smartbert", "'attention_heads': 4"),
        ("palbert", ee.objectives.Palbert(halting_input="diff"), "'halting_input': 'diff'"),
    ],
)
def test_a_method_refuses_exits_of_another_shape(made_for, asked, words):
    model = ee.to_early_exit(stock("bert", **TINY), method=made_for)
    before = model.config.method
    with pytest.raises(ValueError, match="trains exits with") as caught:
        next(ee.phases(model, asked))
    assert words in str(caught.value) and model.config.method == before


def test_a_method_takes_exits_that_serve_it():
    """Without a dense module it doesn't matter whose it would be; halting outputs may be left unused."""
    pooled = ee.to_early_exit(stock("bert", **TINY), pooling="mean")
    assert [phase.name for phase in ee.phases(pooled, "deebert")] == ["backbone", "exits"]
    halting = ee.to_early_exit(stock("bert", **TINY), method="palbert")
    assert [phase.name for phase in ee.phases(halting, "joint")] == ["joint"]
    assert (
        ee.to_early_exit(stock("bert", **TINY), method=ee.objectives.Dact(halting_bias=-1.0)).set_objective(
            ee.objectives.Dact()
        )
        is None
    )


@pytest.mark.parametrize("phase", [-1, 1, 7])
def test_a_phase_that_there_is_not(phase):
    model = ee.to_early_exit(stock("bert", **TINY))
    with pytest.raises(ValueError, match=f"has phases 0 to 0, got {phase}"):
        model.enter_phase(phase)
    assert model.phase is not None and model.phase.name == "joint"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_rows_cost_nothing(name):
    model = ee.to_early_exit(stock("bert", **TINY), method=name).train()
    empty = {key: values[:0] for key, values in batch_for(model, lengths=(3, 5)).items()}
    for _ in ee.phases(model):
        model.train().set_progress(0, 0.0)
        loss = model(**empty, labels=torch.zeros(0, dtype=torch.long)).loss
        loss.backward()
        assert loss.item() == 0.0
