"""When layers are packed and their copies dropped, and lists of weights that the extension refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from support.models import DEPTH, batch_for, stock

import earlyexit_kernels as ee
from earlyexit_kernels.backends import extension_function
from earlyexit_kernels.cpu import layers
from earlyexit_kernels.criteria import Entropy


def test_layer_is_packed_once(monkeypatch):
    packed, make = [], layers._make
    monkeypatch.setattr(layers, "_make", lambda *given: packed.append(given) or make(*given))
    model = ee.to_early_exit(stock(), pooling="first")
    for _ in range(3):
        model(**batch_for(model))
    assert len(packed) == DEPTH
    with torch.no_grad():
        model.backbone.encoder.layer[2].output.dense.weight.mul_(1.5)
    model(**batch_for(model))
    assert [layer for _, layer in packed[DEPTH:]] == [model.backbone.encoder.layer[2]]


def test_layers_behind_the_last_exit_are_not_packed():
    model = ee.to_early_exit(stock(), pooling="first", criterion=Entropy(threshold=2.0))
    model(**batch_for(model))
    assert list(model.runner.paths["fused"].layers._made) == [model.backbone.encoder.layer[0]]


def test_packed_copies_of_replaced_layers_are_dropped():
    model = ee.to_early_exit(stock(), pooling="first")
    model(**batch_for(model))
    for _ in range(3):
        model.backbone.encoder.layer[1] = copy.deepcopy(model.backbone.encoder.layer[1])
        model(**batch_for(model))
    assert set(model.runner.paths["fused"].layers._made) == set(model.view().layers)


def test_the_extension_refuses_lists_of_wrong_length():
    if ee.available_backends("cpu")["cpp"]:
        pytest.skip(ee.available_backends("cpu")["cpp"])
    make, weights = extension_function("OneDnnLayer"), [torch.ones(6, 6)] * 12
    how = (1, "relu", "", False, 0)
    for given, words in (
        ((weights[:-1], [], [0.1, 0.1]), "expected 12 weights, got 11"),
        ((weights, weights[:1], [0.1, 0.1]), "expected 4 packed weights or none, got 1"),
        ((weights, [], [0.1]), "expected eps of 2 norms, got 1"),
    ):
        with pytest.raises(ValueError, match=f"^OneDnnLayer: {words}"):
            make(*given, *how)
    with pytest.raises(ValueError, match="of each bucket, and inverse for several, got 1"):
        make(weights, [], [0.1, 0.1], *how)(torch.ones(1, 6, 6), [1], [6], [], [None], [None], None)
