"""The commands on a user's own file that docs/data.md shows."""

from __future__ import annotations

import csv
import shlex
from pathlib import Path

import pytest

from earlyexit_cli import main
from earlyexit_kernels.cli.saved import Record

ROOT = Path(__file__).resolve().parents[2]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_commands_of_the_document_run(tmp_path, monkeypatch, capsys):
    """The four commands of docs/data.md, on the rows that its first block of Python writes."""
    pytest.importorskip("matplotlib", reason="the report requires the extra 'plot'")
    section = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").partition("## Your own files")[2]
    program, _, commands = section.partition("```python\n")[2].partition("```\n")
    commands = [shlex.split(line)[1:] for line in commands.splitlines() if line.startswith("    earlyexit ")][:4]
    assert [command[0] for command in commands] == ["train", "calibrate", "eval", "predict"]
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    for command in commands:
        assert main(command) == 0
    predictions = rows_of(tmp_path / "predictions.csv")
    assert len(predictions) == 100 and {row["label"] for row in predictions} == {"bad", "good"}
    scores = [score["accuracy"] for score in Record.load(tmp_path / "out").scores]
    assert max(scores) > 0.8, "the example learns too little to show anything"
    assert len({row["exit_layer"] for row in predictions}) > 1
