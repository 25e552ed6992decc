"""Fixtures for tests of the command line: a small stock model on disk, and the generated task with few rows."""

from __future__ import annotations

from functools import partial

import pytest

from earlyexit_kernels.data import toy
from earlyexit_kernels.tasks import load


@pytest.fixture
def small_task(monkeypatch):
    """Reduce the generated task to a few rows."""
    monkeypatch.setattr(load, "toy_splits", partial(load.toy_splits, train_rows=96, dev_rows=24, test_rows=0))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder with a stock model and its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    toy.toy_model(0, layers=2, hidden=16).save_pretrained(folder)
    toy.toy_tokenizer().save_pretrained(folder)
    return folder
