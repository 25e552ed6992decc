"""Layers on the vector kernels: equal bits in every batch, weights stored in fewer bits, and the embeddings before."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from core.test_fused import fused_of
from support.models import batch_for, early_exit, stock

import earlyexit_kernels as ee
from earlyexit_kernels.backends import extension_function
from earlyexit_kernels.cpu import kernels
from earlyexit_kernels.cpu.embed import Summed, Widened
from earlyexit_kernels.cpu.kernels import PackedLayer, kernels_unsupported_reason
from earlyexit_kernels.cpu.layers import FusedLayers
from earlyexit_kernels.cpu.panels import native_layouts
from earlyexit_kernels.criteria import Entropy, Patience

pytestmark = pytest.mark.skipif(
    bool(kernels_unsupported_reason(torch.float32)), reason="the processor has no vector kernels"
)
#: How weights are stored -> largest difference of logits.
STORED = {"float32": 2e-5, "float16": 5e-3, "bfloat16": 5e-2, "int8": 0.25}
STORED = {name: error for name, error in STORED.items() if kernels.STORED[name] in native_layouts()}


def model_with(stored, family="bert"):
    model = early_exit(family)
    model.configure(path="fused", weights=stored)
    return model


def bytes_of(model) -> int:
    assert all(isinstance(layer, PackedLayer) for layer in fused_of(model))
    return sum(x.nbytes for layer in fused_of(model) for x in layer.packed.weights)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("family", ["bert", "albert", "distilbert"])
def test_stored_weights(family, stored):
    """Their memory, answers, and a change of any of them; copies of the model keep the choice."""
    model = model_with(stored, family)
    own = copy.deepcopy(model)
    own.configure(path="eager")
    batch = batch_for(model)
    before = model.trace(**batch).logits
    torch.testing.assert_close(before, own.trace(**batch).logits, atol=STORED[stored], rtol=0)
    assert bytes_of(model) == bytes_of(model_with("float32", family)) * kernels.STORED[stored].itemsize // 4
    twin = copy.deepcopy(model)
    for name, parameter in model.view().layers[0].named_parameters():
        if "key.bias" not in name and "k_lin.bias" not in name:  # which softmax does not see
            parameter.data.mul_(1.5).add_(0.1)
            after = model.trace(**batch).logits
            assert not torch.equal(before, after), name
            before = after
    model.configure(path="fused")
    for each, dtype in ((model, torch.float32), (twin, kernels.STORED[stored])):
        expected = torch.uint8 if dtype == torch.int8 else dtype
        assert fused_of(each)[0].packed.weights[0].dtype == expected


def test_copies_of_another_type_are_made_again():
    """As by a batch that began before `configure`, which drops the copies, and reaches a layer after it."""
    model, fused = early_exit("bert"), FusedLayers()
    for stored in (torch.float32, torch.bfloat16, torch.float32):
        encoder = fused.encoder(model.adapter, model.backbone, stored, lambda layer, reason: None)
        assert encoder.layers[0].packed.weights[0].dtype == stored


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("pooling", [None, "first", "mean"])
def test_a_row_has_the_same_bits_in_every_batch(pooling, stored):
    model = ee.to_early_exit(stock("bert"), pooling=pooling)
    model.configure(path="fused", weights=stored)
    lengths = torch.randint(1, 40, (32,), generator=torch.Generator().manual_seed(0))
    ids = torch.randint(5, 100, (32, 40), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(40) < lengths[:, None]).long()

    def run(rows):
        out = model(input_ids=ids[rows], attention_mask=mask[rows])
        return out.logits, out.exit_layer

    shuffled = torch.randperm(32, generator=torch.Generator().manual_seed(2)).tolist()
    for criterion in (None, Entropy(threshold=0.9), Patience(patience=1)):
        model.set_criterion(criterion)
        alone = [torch.cat(parts) for parts in zip(*(run([i]) for i in range(32)), strict=True)]
        for rows in (list(range(32)), shuffled, shuffled[:7]):
            logits, exit_layer = run(rows)
            assert torch.equal(logits, alone[0][rows]) and torch.equal(exit_layer, alone[1][rows])


def test_the_extension_refuses_lists_of_wrong_length():
    if reason := ee.available_backends("cpu")["cpp"]:
        pytest.skip(reason)
    make, weights = extension_function("OneDnnLayer"), [torch.ones(6, 6)] * 12
    how = (1, "relu", "", False, 0)
    for arguments, words in (
        ((weights[:-1], [], [0.1, 0.1]), "expected 12 weights, got 11"),
        ((weights, weights[:1], [0.1, 0.1]), "expected 4 packed weights or none, got 1"),
        ((weights, [], [0.1]), "expected eps of 2 norms, got 1"),
    ):
        with pytest.raises(ValueError, match=f"^OneDnnLayer: {words}"):
            make(*arguments, *how)
    with pytest.raises(ValueError, match="of each bucket, and inverse for several, got 1"):
        make(weights, [], [0.1, 0.1], *how)(torch.ones(1, 6, 6), [1], [6], [], [None], [None], None)


# embeddings


def embedding(model):
    """Return what embeds; it gives the input of layer 1 of the family, and a token the same bits beside any others."""
    ids = batch_for(model)["input_ids"][:1]
    tokens = ids, model.adapter.positions(model.backbone, ids).expand(ids.shape), torch.zeros_like(ids)
    embed, together = model.runner._encoder(model.view()).embed, model.adapter.first_states(model.backbone, *tokens)
    torch.testing.assert_close(embed(*tokens), together, atol=2e-6, rtol=2e-6)
    if isinstance(embed, Summed) or getattr(embed, "multiply", None) is not None:
        alone = [embed(*(x[:, i : i + 1] for x in tokens)) for i in range(ids.shape[1])]
        assert torch.equal(torch.cat(alone, dim=1), embed(*tokens))
    return embed


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "albert"])
@torch.no_grad()
def test_embeddings_are_those_of_the_family(family):
    """By the kernels, from weights that are read when they are used."""
    model = early_exit(family)
    widened = model.adapter.widen(model.backbone) is not None
    for parameter in (None, *model.backbone.embeddings.parameters()):
        if parameter is not None:
            parameter.data = parameter.data * 1.5
        embed = embedding(model)
        assert type(embed) is (Widened if widened else Summed)
        assert type(embed.embed if widened else embed) is Summed


def hooked(model):
    model.backbone.embeddings.LayerNorm.register_forward_hook(lambda module, inputs, out: 2 * out)


def transposed(model):
    table = model.backbone.embeddings.word_embeddings
    table.weight = torch.nn.Parameter(table.weight.detach().T.contiguous().T)


def replaced(model):
    model.backbone.embeddings.LayerNorm = torch.nn.RMSNorm(64)


def limited(model):
    model.backbone.embeddings.token_type_embeddings.max_norm = 0.5


@pytest.mark.parametrize("change", [hooked, transposed, replaced, limited])
@torch.no_grad()
def test_embeddings_that_the_kernels_do_not_compute_stay_modules(change):
    model = early_exit("bert")
    assert type(embedding(model)) is Summed
    change(model)
    assert type(embedding(model)) is functools.partial


@torch.no_grad()
def test_a_hook_on_the_linear_that_widens_embeddings_is_called():
    model = early_exit("electra")
    model.adapter.widen(model.backbone).register_forward_hook(lambda module, inputs, out: 2 * out)
    embedding(model)
