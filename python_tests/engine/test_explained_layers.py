"""What `explain` says of fused layers: which kernels compute their products, and in which type weights are stored."""

from __future__ import annotations

import logging

import pytest
import torch
from support.models import batch_for, early_exit

from earlyexit_kernels.engine import fused_layers, packed_layers
from earlyexit_kernels.engine.fused_bert import onednn_unsupported_reason
from earlyexit_kernels.engine.packed_layers import STORED, kernels_unsupported_reason

NO_KERNELS, NO_ONEDNN = "the processor is too old", "no such names"
needs_kernels = pytest.mark.skipif(
    bool(kernels_unsupported_reason(torch.float32)), reason="the processor has no vector kernels"
)


def explained(model):
    return model.explain(**batch_for(model))


def leave_out(monkeypatch, *, onednn=False):
    monkeypatch.setattr(fused_layers, "kernels_unsupported_reason", lambda dtype: NO_KERNELS)
    monkeypatch.setattr(fused_layers, "onednn_unsupported_reason", lambda dtype: NO_ONEDNN if onednn else None)


@needs_kernels
@pytest.mark.parametrize("stored", STORED)
def test_vector_kernels_and_the_type_of_the_weights(stored):
    if reason := kernels_unsupported_reason(torch.float32, STORED[stored]):
        pytest.skip(reason)
    model = early_exit()
    model.set_layers("fused", weights=stored)
    kernels = {"AVX512": "avx512", "AVX2": "avx2"}[torch.backends.cpu.get_cpu_capability()]
    found = explained(model)
    assert (found.products.name, found.weights) == (kernels, stored)
    assert f"products of the layers {kernels!r}: vector kernels of the package, weights in {stored!r}" in str(found)


@needs_kernels
def test_kernels_of_another_processor(monkeypatch):
    described = packed_layers.extension_function("layer_kernels")()
    monkeypatch.setattr(packed_layers, "extension_function", lambda name: lambda: {**described, "name": "AVX2"})
    assert explained(early_exit()).products.name == "avx2"


@pytest.mark.parametrize("family", ["bert", "modernbert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_onednn(family, dtype, monkeypatch):
    leave_out(monkeypatch)
    products, weights = explained(early_exit(family).to(dtype))[-2:]
    assert (products.name, weights) == ("onednn", str(dtype).removeprefix("torch."))
    assert (NO_KERNELS in products.reason) == (family == "bert")
    assert ("only layers of BERT's form" in products.reason) == (family == "modernbert")


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_products_of_torch(family):
    """In float16 oneDNN is not used."""
    products, weights = explained(early_exit(family).half())[-2:]
    assert (products.name, weights) == ("torch", "float16")
    assert onednn_unsupported_reason(torch.float16) in products.reason


def test_large_batches_on_onednn_without_avx512(monkeypatch):
    leave_out(monkeypatch)
    model = early_exit()
    for capability, beyond in (("AVX2", True), ("AVX512", False)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert ("torch's own beyond 128 tokens" in explained(model).products.reason) == beyond


def test_other_layers_have_no_products():
    model = early_exit()
    model.set_layers("family")
    for each in (model, early_exit("deberta"), early_exit().train()):
        assert explained(each)[-2:] == (None, None) and "products" not in str(explained(each))


@pytest.mark.parametrize(("onednn", "level"), [(False, logging.INFO), (True, logging.WARNING)])
def test_auto_logs_the_products(onednn, level, monkeypatch, caplog):
    """ModernBERT's layers too, which have no vector kernels; a missing part of torch is a warning."""
    for family, words in (("bert", NO_KERNELS), ("modernbert", "only layers of BERT's form")):
        leave_out(monkeypatch, onednn=onednn)
        model = early_exit(family)
        caplog.clear()
        with caplog.at_level(logging.INFO, "earlyexit_kernels"):
            model(**batch_for(model))
        said = [record for record in caplog.records if "chose 'fused'" in record.message]
        assert [record.levelno for record in said] == [level] and words in said[0].message
        assert ("products by 'torch'" if onednn else "products by 'onednn'") in said[0].message
