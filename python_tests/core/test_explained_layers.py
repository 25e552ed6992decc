"""What `explain` says of fused layers: which kernels compute their products, and in which type weights are stored."""

from __future__ import annotations

import logging

import pytest
import torch
from support.models import batch_for, early_exit

from earlyexit_kernels.cpu import kernels, layers
from earlyexit_kernels.cpu.kernels import STORED, kernels_unsupported_reason
from earlyexit_kernels.cpu.onednn import onednn_unsupported_reason

NO_KERNELS, NO_ONEDNN = "the processor is too old", "no such names"
needs_kernels = pytest.mark.skipif(
    bool(kernels_unsupported_reason(torch.float32)), reason="the processor has no vector kernels"
)


def explained(model):
    return model.explain()


def leave_out(monkeypatch, *, onednn=False):
    monkeypatch.setattr(layers, "kernels_unsupported_reason", lambda *dtypes: NO_KERNELS)
    monkeypatch.setattr(layers, "onednn_unsupported_reason", lambda dtype: NO_ONEDNN if onednn else None)


@needs_kernels
@pytest.mark.parametrize("stored", STORED)
def test_vector_kernels_and_the_type_of_the_weights(stored):
    if reason := kernels_unsupported_reason(torch.float32, STORED[stored]):
        pytest.skip(reason)
    model = early_exit()
    model.configure(path="fused", weights=stored)
    names = {"AVX512": "avx512", "AVX2": "avx2"}[torch.backends.cpu.get_cpu_capability()]
    found = explained(model)
    assert (found.products, found.weights) == (names, stored)
    assert f"products of the layers {names!r}: vector kernels of the package\nweights stored in {stored!r}" in str(
        found
    )
    assert len(str(found).splitlines()) <= 6


@needs_kernels
def test_kernels_of_another_processor(monkeypatch):
    described = kernels.extension_function("layer_kernels")()
    monkeypatch.setattr(kernels, "extension_function", lambda name: lambda: {**described, "name": "AVX2"})
    assert explained(early_exit()).products == "avx2"


@pytest.mark.parametrize("family", ["bert", "modernbert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_onednn(family, dtype, monkeypatch):
    leave_out(monkeypatch)
    found = explained(early_exit(family).to(dtype))
    assert (found.products, found.weights) == ("onednn", str(dtype).removeprefix("torch."))
    assert (NO_KERNELS in found.why) == (family == "bert")
    assert ("only layers of BERT's form" in found.why) == (family == "modernbert")


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_products_of_torch(family):
    """In float16 oneDNN is not used."""
    found = explained(early_exit(family).half())
    assert (found.products, found.weights) == ("torch", "float16")
    assert onednn_unsupported_reason(torch.float16) in found.why


def test_large_batches_on_onednn_without_avx512(monkeypatch):
    leave_out(monkeypatch)
    model = early_exit()
    for capability, beyond in (("AVX2", True), ("AVX512", False)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert ("torch's own beyond 128 tokens" in explained(model).why) == beyond


def test_other_layers_have_no_products():
    model = early_exit()
    model.configure(path="eager")
    for each in (model, early_exit("deberta"), early_exit().train()):
        assert explained(each)[-3:] == (None, "", None) and "products" not in str(explained(each))


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
