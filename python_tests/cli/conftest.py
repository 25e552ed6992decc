"""A model trained on a user's own file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.own_files import write_rows

from earlyexit_cli import main

COLUMNS = ["--text-column", "review", "--label-column", "opinion"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folder with train.csv, of 240 rows, and other.csv."""
    folder = tmp_path_factory.mktemp("files")
    write_rows(folder / "train.csv", 240, text="review", label="opinion")
    write_rows(folder / "other.csv", 60, seed=1, text="review", label="opinion")
    return folder


@pytest.fixture(scope="module")
def trained(base, files, tmp_path_factory):
    """Folder written by `earlyexit train --data train.csv`."""
    folder = tmp_path_factory.mktemp("trained") / "out"
    rows = ["--data", str(files / "train.csv"), *COLUMNS, "--holdout", "120", "--max-length", "48"]
    training = ["--epochs", "16", "--lr", "5e-3"]
    assert main(["train", str(base), *rows, "--output", str(folder), *training]) == 0
    return folder


@pytest.fixture
def model(trained, tmp_path):
    """A copy of `trained`."""
    return Path(shutil.copytree(trained, tmp_path / "out"))
