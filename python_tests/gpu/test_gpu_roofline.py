"""The predicted times of the GPU: they grow with the work, and the documents show the current ones."""

from __future__ import annotations

import pytest

from benchmarks import readme
from benchmarks.end_to_end.forced import NEVER
from benchmarks.gpu import roofline
from benchmarks.gpu.roofline import BATCHES, COMPILED_LAYER, LAYERS, PLAIN_LAYER, captured_us, half_of, stock_us
from earlyexit_kernels.core import counts


def test_tables_of_the_document_are_current():
    text = (readme.ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    for name in ("gpu_roofline", "gpu_constants"):
        assert f"<!-- table:{name} -->\n{readme.TABLES[name]()}\n<!-- end -->" in text, "python -m benchmarks.readme"


@pytest.mark.parametrize("layer", [PLAIN_LAYER, COMPILED_LAYER], ids=lambda layer: layer.name)
def test_more_work_takes_longer(layer):
    never, half = ([captured_us(layer, rows, mix(rows)) for rows in BATCHES] for mix in (lambda rows: NEVER, half_of))
    assert never == sorted(never) and half == sorted(half) and stock_us(1) < stock_us(32) < stock_us(128)
    assert all(0.5 * full < less < full for full, less in zip(never, half, strict=True))
    assert all(layer_us(rows) > LAYERS * roofline.LEAST.value for rows in BATCHES for layer_us in (stock_us,))


def test_compiled_layers_are_faster():
    for rows in BATCHES:
        assert captured_us(COMPILED_LAYER, rows, NEVER) < captured_us(PLAIN_LAYER, rows, NEVER)


def test_padding_to_a_level_is_counted():
    size = roofline.level_for(33)
    assert size.tokens == 6144 > 33 * roofline.LENGTH
    by_level, exact = (roofline.layer_us(PLAIN_LAYER, tokens, 33, 0) for tokens in (size.tokens, 33 * roofline.LENGTH))
    assert by_level > 1.2 * exact
    assert roofline.layer_us(PLAIN_LAYER, 4096, 32, 480) > roofline.layer_us(PLAIN_LAYER, 4096, 32, 0)


def test_slow_host_is_waited_for(monkeypatch):
    fast = captured_us(PLAIN_LAYER, 1, NEVER)
    monkeypatch.setattr(roofline, "HOST_LAYER", roofline.HOST_LAYER._replace(value=200.0))
    slow = captured_us(PLAIN_LAYER, 1, NEVER)
    assert slow > LAYERS * 200 > fast


def test_late_counts_run_a_layer_more():
    assert counts.LAG == roofline.LAG == 1
    one_row = captured_us(PLAIN_LAYER, 1, half_of(1))
    per_layer = (captured_us(PLAIN_LAYER, 1, NEVER) - one_row) / (LAYERS - LAYERS / 2 - 1)
    assert per_layer > roofline.layer_us(PLAIN_LAYER, roofline.level_for(1).tokens, 1, 0), "7 layers ran, not 6"
