"""Models on the vector kernels: equal bits in every batch, weights stored in half precision, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from support.models import batch_for, early_exit, stock

import earlyexit_kernels as ee
from earlyexit_kernels.cpu import kernels, layers
from earlyexit_kernels.cpu.kernels import PackedLayer, kernels_unsupported_reason
from earlyexit_kernels.cpu.panels import native_layouts
from earlyexit_kernels.criteria import Entropy, Patience
from earlyexit_kernels.errors import BackendUnavailableError

pytestmark = pytest.mark.skipif(
    bool(kernels_unsupported_reason(torch.float32)), reason="the processor has no vector kernels"
)
#: How weights are stored -> largest difference of logits.
STORED = {"float32": 2e-5, "float16": 5e-3, "bfloat16": 5e-2, "int8": 0.25}
STORED = {name: error for name, error in STORED.items() if kernels.STORED[name] in native_layouts()}


def model_with(stored="float32", family="bert", **options):
    model = early_exit(family, **options)
    model.configure(path="fused", weights=stored)
    return model


def layers_of(model):
    return model.runner._encoder(model.view()).layers


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("family", ["bert", "roberta", "albert", "electra", "distilbert"])
def test_stored_weights(family, stored):
    model = model_with(stored, family)
    own = copy.deepcopy(model)
    own.configure(path="eager")
    batch = batch_for(model)
    assert all(isinstance(layer, PackedLayer) for layer in layers_of(model))
    torch.testing.assert_close(model.trace(**batch).logits, own.trace(**batch).logits, atol=STORED[stored], rtol=0)


def test_memory_of_the_packed_weights():
    sizes = {
        stored: sum(x.nbytes for layer in layers_of(model_with(stored)) for x in layer.packed.weights)
        for stored in STORED
    }
    assert sizes["float16"] == sizes["bfloat16"] == sizes["float32"] / 2
    assert "int8" not in sizes or sizes["int8"] == sizes["float32"] / 4


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("pooling", [None, "first", "mean"])
@pytest.mark.parametrize("criterion", [None, Entropy(threshold=0.9), Patience(patience=1)])
def test_a_row_has_the_same_bits_in_every_batch(criterion, pooling, stored):
    model = ee.to_early_exit(stock("bert"), pooling=pooling)
    model.configure(path="fused", weights=stored)
    model.set_criterion(criterion)
    lengths = torch.randint(1, 40, (32,), generator=torch.Generator().manual_seed(0))
    ids = torch.randint(5, 100, (32, 40), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(40) < lengths[:, None]).long()

    def run(rows):
        out = model(input_ids=ids[rows], attention_mask=mask[rows])
        return out.logits, out.exit_layer

    alone = [torch.cat(each) for each in zip(*(run([i]) for i in range(32)), strict=True)]
    shuffled = torch.randperm(32, generator=torch.Generator().manual_seed(2)).tolist()
    for rows in (list(range(32)), list(range(7)), shuffled, shuffled[:7]):
        logits, exit_layer = run(rows)
        assert torch.equal(logits, alone[0][rows]) and torch.equal(exit_layer, alone[1][rows])


@pytest.mark.parametrize("family", ["albert", "electra", "distilbert", "roberta"])
def test_rows_of_every_family_have_the_same_bits_in_every_batch(family):
    """ALBERT and ELECTRA widen their embeddings by a product of their own."""
    sizes = {"embedding_size": 96} if family in ("albert", "electra") else {}
    model = ee.to_early_exit(stock(family, hidden_size=192, intermediate_size=256, **sizes))
    model.configure(path="fused")
    g = torch.Generator().manual_seed(0)
    ids, lengths = torch.randint(5, 100, (24, 24), generator=g), torch.arange(1, 25)
    mask = (torch.arange(24) < lengths[:, None]).long()
    together = model(input_ids=ids, attention_mask=mask).logits
    alone = [model(input_ids=ids[i : i + 1], attention_mask=mask[i : i + 1]).logits for i in range(24)]
    assert torch.equal(torch.cat(alone), together)


@pytest.mark.parametrize("stored", STORED)
def test_changed_weights_are_seen(stored):
    model = model_with(stored)
    batch = batch_for(model)
    before = model.trace(**batch).logits
    for name in ("intermediate.dense.weight", "output.dense.bias", "attention.output.LayerNorm.weight"):
        with torch.no_grad():
            model.backbone.encoder.layer[0].get_parameter(name).mul_(1.5).add_(0.1)
        after = model.trace(**batch).logits
        assert not torch.equal(before, after)
        before = after


def test_copies_keep_the_choice():
    model = model_with("float16")
    twin = copy.deepcopy(model)
    assert layers_of(twin)[0].packed.weights[0].dtype == torch.float16
    model.configure(path="fused")
    assert layers_of(model)[0].packed.weights[0].dtype == torch.float32
    assert layers_of(twin)[0].packed.weights[0].dtype == torch.float16


def test_refused_choices(monkeypatch):
    model = early_exit()
    with pytest.raises(ValueError, match=r"weights: expected one of \('float32', .*\), got 'int4'"):
        model.configure(path="fused", weights="int4")
    with pytest.raises(ValueError, match="must be asked for with path 'fused', got 'auto'"):
        model.configure(path="auto", weights="float16")
    with pytest.raises(BackendUnavailableError, match=r"'modernbert' cannot be stored in torch\.float16"):
        early_exit("modernbert").configure(path="fused", weights="float16")
    with pytest.raises(BackendUnavailableError, match=r"they compute in float32, the model is torch\.bfloat16"):
        model.bfloat16().configure(path="fused", weights="float16")
    model.float().configure(path="fused", weights="float16")
    monkeypatch.setattr(layers, "kernels_unsupported_reason", lambda *dtypes: "the processor is too old")
    model.refresh()
    with pytest.raises(BackendUnavailableError, match="require the vector kernels: the processor is too old"):
        model(**batch_for(model))


def test_refused_configuration_keeps_the_copies():
    model = early_exit()
    model(**batch_for(model))
    made, settings = model.runner.paths["fused"].layers, model.settings
    for refused in ({"path": "captured"}, {"path": "fused", "backend": "nonsense"}):
        with pytest.raises((BackendUnavailableError, ValueError)):
            model.configure(**refused)
    assert model.runner.paths["fused"].layers is made and model.settings == settings


def test_int8_without_its_instructions_is_refused(monkeypatch):
    layouts = {dtype: layout for dtype, layout in native_layouts().items() if dtype != torch.int8}
    monkeypatch.setattr(kernels, "native_layouts", lambda: layouts)
    assert kernels_unsupported_reason(torch.float32) is None
    with pytest.raises(BackendUnavailableError, match=r"weights in torch\.int8 require AVX512-VNNI, .*CAPABILITY=avx2"):
        early_exit().configure(path="fused", weights="int8")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory_for_the_copies_runs_the_family_layers(error, monkeypatch):
    def pack(*args):
        raise error

    model = early_exit()
    own = model.trace(**batch_for(model)).logits
    model.refresh()
    monkeypatch.setattr(PackedLayer, "of", staticmethod(pack))
    torch.testing.assert_close(model.trace(**batch_for(model)).logits, own, atol=2e-5, rtol=0)
    assert "not enough memory for a packed copy" in model.explain().reason
    model.configure(path="fused")
    with pytest.raises(BackendUnavailableError, match="not enough memory for a packed copy"):
        model(**batch_for(model))


def test_other_errors_while_packing_are_raised(monkeypatch):
    def pack(*args):
        raise RuntimeError("a fault of the package")

    model = early_exit()
    monkeypatch.setattr(PackedLayer, "of", staticmethod(pack))
    with pytest.raises(RuntimeError, match="a fault of the package"):
        model(**batch_for(model))
