"""Tables and files of results: markdown tables, JSON files and the environment."""

from __future__ import annotations

import json
import math
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from earlyexit_kernels.criteria import Entropy, FullDepth, Patience, SkipGate
from earlyexit_kernels.tuning import tables


def test_json_is_written_to_pipes_and_through_links(tmp_path):
    """A rename would replace a pipe such as /dev/stdout by a file."""
    pipe, link, file = tmp_path / "pipe", tmp_path / "link", tmp_path / "file"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(pipe.read_text)
        assert tables.write_json(pipe, [{"x": 1}]) == pipe
        assert json.loads(read.result(60))["records"] == [{"x": 1}] and pipe.is_fifo()
    link.symlink_to(file)
    tables.write_json(link, [{"x": 2}])
    assert link.is_symlink() and json.loads(file.read_text())["records"] == [{"x": 2}]


def test_table_pads_columns_and_aligns_numbers_right():
    table = tables.markdown_table(("name", "x"), [("a|b", "1.5"), ("longer", "-20%")])
    assert table.splitlines() == [
        "| name   |    x |",
        "|--------|-----:|",
        "| a\\|b   |  1.5 |",
        "| longer | -20% |",
    ]
    assert tables.markdown_table(("a", "b"), []) == "| a   | b   |\n|-----|-----|"
    with pytest.raises(ValueError, match=r"expected 2 cells per row, got \['1'\]"):
        tables.markdown_table(("a", "b"), [(1,)])


def test_json_has_the_environment_and_no_infinity(tmp_path):
    path = tables.write_json(tmp_path / "new" / "r.json", [{"x": math.inf, "y": (1, math.nan)}], seed=3)
    document = json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert document["records"] == [{"x": None, "y": [1, None]}] and document["seed"] == 3
    assert document["environment"]["packages"]["torch"] == torch.__version__


def test_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tables.write_json(tmp_path / "r.json", [{"x": 1}])
    before = path.read_text(encoding="utf-8")
    monkeypatch.setattr(Path, "replace", lambda *_: pytest.fail("stopped"))
    with pytest.raises(pytest.fail.Exception):
        tables.write_json(path, [{"x": 2}])
    assert path.read_text(encoding="utf-8") == before


def test_environment_reports_flushed_denormals():
    torch.set_flush_denormal(False)
    assert tables.environment()["flush_denormal"] is False
    if torch.set_flush_denormal(True):
        assert tables.environment()["flush_denormal"] is True
        torch.set_flush_denormal(False)


def test_commit_without_git_is_the_environment_variable(monkeypatch):
    def no_git(*_):
        raise OSError("git is not installed")

    monkeypatch.setattr(tables, "_git", no_git)
    monkeypatch.delenv("EARLYEXIT_COMMIT", raising=False)
    assert tables.environment()["commit"] is None
    monkeypatch.setenv("EARLYEXIT_COMMIT", "0123456789ab")
    assert tables.environment()["commit"] == "0123456789ab"


def test_commit_is_that_of_the_checkout():
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists() or Path(tables.__file__).resolve().parents[2] != root:
        pytest.skip("the package does not lie in a git checkout")
    head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    assert head.startswith(tables.environment()["commit"].removesuffix("+"))


@pytest.mark.parametrize(
    ("criterion", "text"),
    [
        (Patience(patience=2), "patience 2"),
        (SkipGate(threshold=0.5, exit=Entropy(threshold=0.35)), "threshold 0.5, exit entropy (threshold 0.35)"),
        (SkipGate(threshold=0.5, exit=FullDepth()), "threshold 0.5, exit full_depth"),
        (FullDepth(), ""),
    ],
)
def test_parameters_of_a_criterion_in_words(criterion, text):
    assert tables.parameter_text(criterion) == text
