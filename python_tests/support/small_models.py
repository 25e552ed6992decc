"""Fixtures for tests of the command line: a small stock model on disk."""

from __future__ import annotations

import pytest

from earlyexit_kernels.data import toy


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder with a stock model and its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    toy.toy_model(0, layers=2, hidden=16).save_pretrained(folder)
    toy.toy_tokenizer().save_pretrained(folder)
    return folder
