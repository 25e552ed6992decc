"""The predicted times of the GPU: what the tiles of every product read, and how many processors they leave idle."""

from __future__ import annotations

import json

import pytest

from benchmarks.end_to_end.forced import NEVER
from benchmarks.gpu import roofline
from earlyexit_kernels.ops.tiles import Tiles

#: Tile that reads the least from the L2 cache of those whose sums fit into the registers of a program on Hopper.
LARGEST = Tiles(256, 128, 64, warps=8, stages=3, resident=1)


@pytest.mark.parametrize("tokens", [128, 1024, 4096, 16384])
@pytest.mark.parametrize("name", roofline.PRODUCTS)
def test_products_read_little_and_use_the_card(name, tokens):
    weights, columns, terms, in_parts = roofline.PRODUCTS[name]
    tiles, parts = roofline.tiles_of(tokens, columns, weights, in_parts), roofline.parts_of(tokens, columns, in_parts)
    count = tiles.count(tokens, parts * weights * columns)
    assert count >= roofline.CARD.processors / 2, "more than half of the multiprocessors are idle"
    if tokens >= 4096:
        least = roofline.l2_bytes(LARGEST, tokens, weights * columns, terms)
        assert roofline.l2_bytes(tiles, tokens, weights * columns, terms) <= 1.6 * least


def test_parts_side_by_side_are_faster_for_few_tokens(monkeypatch):
    def times(tokens):
        return [roofline.product_us(name, tokens, tokens) for name in ("attention output", "output")]

    for tokens in (128, 256, 512, 1024):
        split = times(tokens)
        with monkeypatch.context() as patch:
            patch.setattr(roofline, "few_tiles", lambda *_: False)
            assert all(ours < whole for ours, whole in zip(split, times(tokens), strict=True))


def test_fewer_rows_and_layers_take_less_time():
    for rows in roofline.BATCHES:
        never, half = (sum(roofline.pass_us(rows, exits).values()) for exits in (NEVER, roofline._half(rows)))
        assert 0.4 * never < half < 0.85 * never
    assert sum(roofline.pass_us(1, NEVER).values()) < sum(roofline.pass_us(32, NEVER).values())


def test_few_live_tokens_run_in_narrow_tiles(monkeypatch):
    """Of 4096 tokens a quarter, in tiles of 128 columns instead of 192."""
    name, tokens = "output", 4096
    some, all_ = (roofline.product_us(name, live, tokens) for live in (tokens // 4, tokens))
    monkeypatch.setattr(roofline, "FIRST_COLUMNS", 192)
    assert some < roofline.product_us(name, tokens // 4, tokens) and all_ == roofline.product_us(name, tokens, tokens)


def test_a_single_row_does_not_move():
    """As in `ResidentLoop`, whose bucket of one row has no launch that moves rows."""
    for rows in roofline.BATCHES:
        assert (roofline.pass_us(rows, NEVER)["moves"] > 0) == (rows > 1)


def test_measured_times_stand_beside_the_predicted_ones(tmp_path):
    assert "measured" not in roofline.table(tmp_path)
    names = {"rows_linear_tma_kernel": 1800.0, "rows_linear_kernel": 100.0, "exit_kernel": 50.0, "Memset": 7.0}
    names |= {"rows_attention_kernel": 90.0, "rows_add_norm_kernel": 120.0, "gather_rows_kernel": 30.0}
    cases = {f"B 32, {NEVER}": names, f"B 1, {NEVER}": {k: v for k, v in names.items() if not k.startswith("gather")}}
    records = [
        {"suite": "gpu_kernels", "dtype": "float16", "case": case, "engine": name, "microseconds": time}
        for case, own in cases.items()
        for name, time in own.items()
    ]
    document = {"environment": {"cpu": "fake"}, "suites": {}, "records": records}
    (tmp_path / "fake.json").write_text(json.dumps(document))
    for case, total in zip(cases, (2197, 2167), strict=True):
        (line,) = [line for line in roofline.table(tmp_path).splitlines() if line.startswith(f"| {case} ")]
        assert "measured 1900" in line and "measured 7 " in line and f"measured {total}" in line
