"""Plots of the trade-off between score and layers."""

from __future__ import annotations

import sys

import pytest

from earlyexit_kernels.tuning import plots

CURVES = {"entropy": [(3.0, 0.9), (1.0, 0.7), (6.0, 0.9)], "patience": [(2.0, 0.8)]}


def test_plot_is_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    path = plots.plot_tradeoff(
        tmp_path / "p" / "curve.png",
        CURVES,
        baselines={"static truncation": [(1.0, 0.6), (6.0, 0.9)]},
        chosen={"entropy": (3.0, 0.9)},
        depth=6,
        metric="accuracy",
        title="t",
        rows=100,
    )
    assert path.read_bytes().startswith(b"\x89PNG")


def test_coinciding_curves_are_merged():
    same = [(6.0, 0.9), (2.0, 0.8002), (3.0, 0.9), (1.0, 0.7)]
    merged = plots.merged({**CURVES, "margin": same})
    assert [names for names, _ in merged] == [["entropy", "margin"], ["patience"]]


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plots.plot_tradeoff(tmp_path / "x.png", {}, baselines={}, chosen={}, depth=2, metric="m", title="t")


def test_many_curves_differ_in_colour_or_marker():
    pairs = {(plots.COLORS[n % len(plots.COLORS)], plots.MARKERS[n % len(plots.MARKERS)]) for n in range(77)}
    assert len(pairs) == 77
