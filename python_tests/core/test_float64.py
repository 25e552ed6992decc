"""Float64 models run on back-end torch by every path."""

from __future__ import annotations

import copy

import pytest
import torch
from support import leaving_models
from support.backends import backend_params
from support.models import balance_classes, batch_for, early_exit, varied_entropy

import earlyexit_kernels as ee
from earlyexit_kernels.criteria import HiddenCosine, Patience, QExit
from earlyexit_kernels.errors import BackendUnavailableError

LENGTHS = [3, 20, 5, 8, 11, 19]
#: Heads of each form that an exit has.
HEADS = {
    **leaving_models.HEADS,
    "berxit": {"method": "berxit", "halting": True},
    "palbert, mean": {"method": "palbert", "pooling": "mean"},
    "difference, mean": {"method": ee.methods.Palbert(halting_input="diff"), "pooling": "mean"},
}


def double(family: str = "bert", **heads):
    """A float64 model, a batch, and its trace."""
    model = early_exit(family, **heads)
    batch = batch_for(model, lengths=LENGTHS)
    balance_classes(model, batch)
    model = model.double()
    return model, batch, model.trace(**batch)


def check(model, batch, rule) -> torch.Tensor:
    """Compare the answers with and without compaction to a replay, and return the exit layers."""
    model.set_criterion(rule)
    logits, exit_layer = ee.replay(model.trace(**batch), rule)
    for compaction in ("always", "never", "auto"):
        model.configure(compaction=compaction)
        answer = model(**batch)
        assert answer.logits.dtype == torch.float32
        assert torch.equal(answer.exit_layer, exit_layer)
        torch.testing.assert_close(answer.logits, logits, rtol=1e-6, atol=1e-6)
    return exit_layer


@pytest.mark.sample(2)
@pytest.mark.parametrize("heads", HEADS)
def test_every_head(heads):
    """The answers are also close to those of the float32 model."""
    model, batch, trace = double(**HEADS[heads])
    assert trace.logits.dtype == torch.float32
    rules = [varied_entropy(trace), Patience(patience=1), HiddenCosine(threshold=0.9)]
    for rule in rules + [QExit(q=0.5)] * ("halting" in model.heads.aux_names):
        check(model, batch, rule)
    model.set_criterion(None)
    wide = copy.deepcopy(model).float()
    torch.testing.assert_close(wide(**batch).logits, model(**batch).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", backend_params(["cpp", "triton"]))
def test_other_back_ends_are_refused(backend):
    model, batch, _ = double()
    with pytest.raises(BackendUnavailableError, match=f"backend '{backend}' does not support a float64 model.*'torch'"):
        model.configure(backend=backend)
    assert model.explain().backend == "torch"
    narrow = copy.deepcopy(model).float()
    narrow.configure(backend=backend)
    with pytest.raises(BackendUnavailableError, match=f"backend '{backend}' does not support a float64 model"):
        narrow.double()(**batch)
