"""The predicted times of the GPU grow with the work."""

from __future__ import annotations

import pytest

from benchmarks.end_to_end.forced import NEVER
from benchmarks.end_to_end.suites import half_of
from benchmarks.gpu import prediction
from benchmarks.gpu.prediction import BATCHES, COMPILED_LAYER, LAYERS, PLAIN_LAYER, captured_us, stock_us
from earlyexit_kernels.core import counts


@pytest.mark.parametrize("layer", [PLAIN_LAYER, COMPILED_LAYER], ids=lambda layer: layer.name)
def test_more_work_takes_longer(layer):
    """Padding to a level is work too, and a slow host is waited for."""
    never, half = ([captured_us(layer, rows, mix(rows)) for rows in BATCHES] for mix in (lambda rows: NEVER, half_of))
    assert never == sorted(never) and half == sorted(half) and stock_us(1) < stock_us(32) < stock_us(128)
    assert all(0.5 * full < less < full for full, less in zip(never, half, strict=True))
    tokens = prediction.level_for(33).tokens
    assert prediction.layer_us(layer, tokens, 33, 0) > 1.2 * prediction.layer_us(layer, 33 * prediction.LENGTH, 33, 0)
    assert prediction.layer_us(layer, 4096, 32, 480) > prediction.layer_us(layer, 4096, 32, 0)


def test_late_counts_run_a_layer_more():
    assert counts.LAG == prediction.LAG == 1
    per_layer = (captured_us(PLAIN_LAYER, 1, NEVER) - captured_us(PLAIN_LAYER, 1, half_of(1))) / (LAYERS / 2 - 1)
    assert per_layer > prediction.layer_us(PLAIN_LAYER, prediction.level_for(1).tokens, 1, 0), "7 layers ran, not 6"
