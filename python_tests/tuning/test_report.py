"""Reports: tables that read as text, JSON that any reader takes, plots that need matplotlib and say so."""

from __future__ import annotations

import json
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from earlyexit_kernels.tuning import report


def test_json_goes_into_pipes_and_through_links_without_replacing_them(tmp_path):
    """As into /dev/stdout: a rename would put a file in its place."""
    pipe, link, file = tmp_path / "pipe", tmp_path / "link", tmp_path / "file"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(pipe.read_text)
        assert report.write_json(pipe, [{"x": 1}]) == pipe
        assert json.loads(read.result(60))["records"] == [{"x": 1}] and pipe.is_fifo()
    link.symlink_to(file)
    report.write_json(link, [{"x": 2}])
    assert link.is_symlink() and json.loads(file.read_text())["records"] == [{"x": 2}]


def test_table_pads_columns_and_puts_numbers_right():
    table = report.markdown_table(("name", "x"), [("a|b", "1.5"), ("longer", "-20%")])
    assert table.splitlines() == [
        "| name   |    x |",
        "|--------|-----:|",
        "| a\\|b   |  1.5 |",
        "| longer | -20% |",
    ]


def test_table_without_rows_is_its_header():
    assert report.markdown_table(("a", "b"), []) == "| a   | b   |\n|-----|-----|"


def test_table_refuses_ragged_rows():
    with pytest.raises(ValueError, match=r"expected 2 cells a row, got \['1'\]"):
        report.markdown_table(("a", "b"), [(1,)])


def test_json_holds_the_environment_and_no_infinity(tmp_path):
    path = report.write_json(tmp_path / "new" / "r.json", [{"x": math.inf, "y": (1, math.nan)}], seed=3)
    document = json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert document["records"] == [{"x": None, "y": [1, None]}] and document["seed"] == 3
    assert document["environment"]["packages"]["torch"] == torch.__version__


def test_json_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = report.write_json(tmp_path / "r.json", [{"x": 1}])
    before = path.read_text(encoding="utf-8")
    monkeypatch.setattr(Path, "replace", lambda *_: pytest.fail("stopped"))
    with pytest.raises(pytest.fail.Exception):
        report.write_json(path, [{"x": 2}])
    assert path.read_text(encoding="utf-8") == before


def test_environment_tells_whether_denormals_are_flushed():
    torch.set_flush_denormal(False)
    assert report.environment()["flush_denormal"] is False
    if torch.set_flush_denormal(True):
        assert report.environment()["flush_denormal"] is True
        torch.set_flush_denormal(False)


CURVES = {"entropy": [(3.0, 0.9), (1.0, 0.7), (6.0, 0.9)], "patience": [(2.0, 0.8)]}


def test_plot_is_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    path = report.plot_tradeoff(
        tmp_path / "p" / "curve.png",
        CURVES,
        baselines={"static truncation": [(1.0, 0.6), (6.0, 0.9)]},
        chosen={"entropy": (3.0, 0.9)},
        depth=6,
        metric="accuracy",
        title="t",
    )
    assert path.read_bytes().startswith(b"\x89PNG")


def test_coinciding_curves_are_drawn_once():
    same = [(6.0, 0.9), (2.0, 0.8002), (3.0, 0.9), (1.0, 0.7)]
    merged = report._merged({**CURVES, "margin": same})
    assert [names for names, _ in merged] == [["entropy", "margin"], ["patience"]]


def test_without_matplotlib_the_cure_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install earlyexit_kernels\[plot\]"):
        report.plot_tradeoff(tmp_path / "x.png", {}, baselines={}, chosen={}, depth=2, metric="m", title="t")


def test_without_git_the_commit_is_what_the_environment_says(monkeypatch):
    def no_git(*_):
        raise OSError("git isn't there")

    monkeypatch.setattr(report, "_git", no_git)
    monkeypatch.delenv("EARLYEXIT_COMMIT", raising=False)
    assert report.environment()["commit"] is None
    monkeypatch.setenv("EARLYEXIT_COMMIT", "0123456789ab")
    assert report.environment()["commit"] == "0123456789ab"
