"""The table of registers and shared memory that the tests of compiled kernels compare."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")
from support import kernel_table
from support.kernel_table import PATH, KernelTable, read, text_of

COMPILED = SimpleNamespace(metadata=SimpleNamespace(name="some_kernel"))


def committed(monkeypatch, cell: str, version: str | None = None) -> KernelTable:
    """A table of one kernel, which now has 40 registers and 1024 bytes of shared memory."""
    monkeypatch.setattr(kernel_table, "usage_of", lambda compiled, folder: (40, 1024))
    table = KernelTable(writes=False)
    table.of_version, table.rows = version or table.version, {("some_kernel", "small"): {90: cell}}
    return table


def test_the_committed_table_is_as_it_would_be_written():
    text = PATH.read_text()
    assert text_of(*read(text)) == text


def test_the_table_is_of_the_triton_that_make_installs():
    """Under another the tests compare no number."""
    (pinned,) = re.findall(r"^TRITON \?= triton==(\S+)$", (PATH.parents[2] / "Makefile").read_text(), re.MULTILINE)
    assert read(PATH.read_text())[0] == pinned


def test_equal_numbers_pass(monkeypatch, tmp_path):
    assert committed(monkeypatch, "40, 1024").check("small", 90, COMPILED, tmp_path) == 40


@pytest.mark.parametrize(
    ("cell", "configuration"), [("39, 1024", "small"), ("40, 512", "small"), ("40, 1024", "large")]
)
def test_other_numbers_and_new_kernels_fail(cell, configuration, monkeypatch, tmp_path):
    with pytest.raises(AssertionError, match="make kernel-table"):
        committed(monkeypatch, cell).check(configuration, 90, COMPILED, tmp_path)


def test_another_version_is_skipped_by_name(monkeypatch, tmp_path):
    with pytest.raises(pytest.skip.Exception, match=r"is of Triton 0\.1, this is"):
        committed(monkeypatch, "39, 1024", "0.1").check("small", 90, COMPILED, tmp_path)
