"""`make fuzz` reports wrong results, exceptions, crashes and hangs, with the example that was running."""

from __future__ import annotations

import json
import sys

import pytest

import deep
from deep import __main__ as runner

#: A target, imported by the process that runs it.
TARGET = """
import os, signal, time
from hypothesis import given, strategies

@given(strategies.integers(0, 1000))
def test(number):
    {statement}
"""


@pytest.mark.parametrize(
    ("statement", "finding", "words"),
    [
        ("assert number < 100, 'a hundred'", "wrong", ["number=100", "a hundred"]),
        ("raise KeyError(number)", "tracebacks", ["KeyError", "number=0"]),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "crashes", ["Segmentation fault", "number=0", "in test"]),
        ("time.sleep(60)", "hangs", ["Aborted", "number=0", "in test"]),
        ("pass", "", []),
    ],
)
def test_finding_is_reported_with_its_example(statement, finding, words, monkeypatch, tmp_path, capsys):
    (tmp_path / "test_here.py").write_text(TARGET.format(statement=statement))
    (tmp_path / "rounds.json").write_text('{"here": 7, "there": 3}')
    monkeypatch.setattr(deep, "__path__", [*deep.__path__, str(tmp_path)])
    monkeypatch.setattr(runner, "FOLDER", tmp_path)
    monkeypatch.setattr(runner, "TARGETS", {"here": (20, 3)})
    monkeypatch.setattr(sys, "argv", ["deep", "--minutes", "0.01"])
    assert runner.main() == bool(finding)
    out = capsys.readouterr().out
    counts = dict(zip(*(line.split() for line in out.splitlines()[-2:]), strict=True))
    assert [name for name in runner.FINDINGS if counts[name] == "1"] == [finding] * bool(finding)
    assert [word for word in words if word not in out] == []
    rounds, cases = int(counts["rounds"]), int(counts["cases"])
    assert json.loads((tmp_path / "rounds.json").read_text()) == {"here": 7 + rounds, "there": 3}
    if finding:
        assert "python -m python_tests.deep --only here --round 7" in out and not rounds
        assert cases == 0 if finding in ("crashes", "hangs") else cases
    else:
        assert rounds and cases == 20 * rounds
