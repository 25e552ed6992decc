"""The embeddings beside layers on the vector kernels: by ops where these compute the same, from the current weights."""

from __future__ import annotations

import functools

import pytest
import torch
from support.models import batch_for, early_exit

from earlyexit_kernels.cpu.embed import Summed, Widened
from earlyexit_kernels.cpu.kernels import kernels_unsupported_reason

pytestmark = pytest.mark.skipif(
    bool(kernels_unsupported_reason(torch.float32)), reason="the processor has no vector kernels"
)
FAMILIES = ("bert", "roberta", "distilbert", "electra", "albert")
TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm")


def embed_of(model):
    return model.runner._encoder(model.view()).embed


def tokens_for(model):
    ids = batch_for(model)["input_ids"][:1]
    return ids, model.adapter.positions(model.backbone, ids).expand(ids.shape), torch.zeros_like(ids)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_equals_the_modules_of_the_family(family):
    model = early_exit(family)
    embed, tokens = embed_of(model), tokens_for(model)
    assert type(embed) is (Widened if model.adapter.widen(model.backbone) else Summed)
    assert type(embed.embed if type(embed) is Widened else embed) is Summed
    want = model.adapter.first_states(model.backbone, *tokens)
    torch.testing.assert_close(embed(*tokens), want, atol=2e-6, rtol=2e-6)


def hooked(model):
    model.backbone.embeddings.LayerNorm.register_forward_hook(lambda module, given, out: 2 * out)


def transposed(model):
    table = model.backbone.embeddings.word_embeddings
    table.weight = torch.nn.Parameter(table.weight.detach().T.contiguous().T)


def replaced(model):
    model.backbone.embeddings.LayerNorm = torch.nn.RMSNorm(64)


@pytest.mark.parametrize("change", [hooked, transposed, replaced])
@torch.no_grad()
def test_modules_that_the_op_does_not_compute_stay(change):
    model = early_exit("bert")
    tokens = tokens_for(model)
    assert type(embed_of(model)) is Summed
    change(model)
    embed = embed_of(model)
    assert type(embed) is functools.partial
    assert torch.equal(embed(*tokens), model.adapter.first_states(model.backbone, *tokens))


def write(parameter, module):
    parameter.mul_(1.5)


def write_to_data(parameter, module):
    parameter.data = parameter.data * 1.5


def replace(parameter, module):
    module.weight = torch.nn.Parameter(parameter * 1.5)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("change", [write, write_to_data, replace])
@torch.no_grad()
def test_weights_are_read_when_they_are_used(change, name):
    model = early_exit("bert")
    batch, tokens = batch_for(model), tokens_for(model)
    before = model.trace(**batch).logits
    module = model.backbone.embeddings.get_submodule(name)
    change(module.weight, module)
    assert not torch.equal(model.trace(**batch).logits, before)
    want = model.adapter.first_states(model.backbone, *tokens)
    torch.testing.assert_close(embed_of(model)(*tokens), want, atol=2e-6, rtol=2e-6)
