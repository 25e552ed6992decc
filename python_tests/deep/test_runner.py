"""`make fuzz` reports wrong results, exceptions, crashes and hangs, with the example that was running."""

from __future__ import annotations

import os
import signal
import sys
import time
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deep import __main__ as runner


def wrong(number):
    assert number < 100, "more than a hundred"


def raises(number):
    raise KeyError(number)


def dies(number):
    os.kill(os.getpid(), signal.SIGSEGV)


def sleeps(number):
    time.sleep(60)


@pytest.mark.parametrize(
    ("body", "finding", "words"),
    [
        (wrong, "wrong", ["number=100", "more than a hundred"]),
        (raises, "tracebacks", ["KeyError", "number=0"]),
        (dies, "crashes", ["Segmentation fault", "number=0", "in dies"]),
        (sleeps, "hangs", ["Aborted", "number=0", "in sleeps"]),
        (lambda number: None, "", []),
    ],
)
def test_finding_is_reported_with_its_example(body, finding, words, monkeypatch, tmp_path, capsys):
    def test(number):
        body(number)

    monkeypatch.setattr(runner, "FOLDER", tmp_path)
    monkeypatch.setattr(runner, "TARGETS", {"here": (20, 3)})
    monkeypatch.setattr(sys, "argv", ["deep", "--minutes", "0.01"])
    module = types.ModuleType("deep.test_here")
    module.test = given(st.integers(0, 1000))(test)
    monkeypatch.setitem(sys.modules, "deep.test_here", module)
    assert runner.main() == bool(finding)
    out = capsys.readouterr().out
    header, row = (line.split() for line in out.splitlines()[-2:])
    counts = dict(zip(header, row, strict=True))
    assert [name for name in runner.FINDINGS if counts[name] == "1"] == [finding] * bool(finding)
    assert [word for word in words if word not in out] == []
    if finding:
        assert "python -m python_tests.deep --only here --round 0" in out
    else:
        assert int(counts["cases"]) >= 20 and int(counts["rounds"]) >= 1
        before = int(counts["rounds"])
        runner.main()
        assert (tmp_path / "rounds.json").read_text() != f'{{"here": {before}}}'
