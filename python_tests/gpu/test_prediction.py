"""The predicted times of the GPU grow with the work."""

from __future__ import annotations

import pytest

from benchmarks.end_to_end.forced import NEVER
from benchmarks.gpu import prediction
from benchmarks.gpu.prediction import BATCHES, COMPILED_LAYER, LAYERS, PLAIN_LAYER, captured_us, half_of, stock_us
from earlyexit_kernels.core import counts


@pytest.mark.parametrize("layer", [PLAIN_LAYER, COMPILED_LAYER], ids=lambda layer: layer.name)
def test_more_work_takes_longer(layer):
    never, half = ([captured_us(layer, rows, mix(rows)) for rows in BATCHES] for mix in (lambda rows: NEVER, half_of))
    assert never == sorted(never) and half == sorted(half) and stock_us(1) < stock_us(32) < stock_us(128)
    assert all(0.5 * full < less < full for full, less in zip(never, half, strict=True))
    assert all(captured_us(COMPILED_LAYER, rows, NEVER) < captured_us(PLAIN_LAYER, rows, NEVER) for rows in BATCHES)


def test_padding_to_a_level_is_counted():
    size = prediction.level_for(33)
    assert size.tokens == 6144 > 33 * prediction.LENGTH
    by_level, exact = (prediction.layer_us(PLAIN_LAYER, tokens, 33, 0) for tokens in (size.tokens, 33 * 128))
    assert by_level > 1.2 * exact
    assert prediction.layer_us(PLAIN_LAYER, 4096, 32, 480) > prediction.layer_us(PLAIN_LAYER, 4096, 32, 0)


def test_slow_host_is_waited_for_and_late_counts_run_a_layer_more(monkeypatch):
    assert counts.LAG == prediction.LAG == 1
    never, half = captured_us(PLAIN_LAYER, 1, NEVER), captured_us(PLAIN_LAYER, 1, half_of(1))
    per_layer = (never - half) / (LAYERS - LAYERS / 2 - 1)
    layer = prediction.layer_us(PLAIN_LAYER, prediction.level_for(1).tokens, 1, 0)
    assert per_layer > layer, "7 layers ran, not 6"
    monkeypatch.setattr(prediction, "HOST_LAYER", prediction.HOST_LAYER._replace(value=200.0))
    assert captured_us(PLAIN_LAYER, 1, NEVER) > LAYERS * 200 > never
