"""`earlyexit predict` on many files: files, rows, output folders, and every row once where workers die."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402
from support.commands import error_of  # noqa: E402
from support.text_models import saved_model, texts  # noqa: E402

import earlyexit_kernels as ee  # noqa: E402
from earlyexit_cli import main  # noqa: E402
from earlyexit_kernels.serving import files, tables  # noqa: E402
from earlyexit_kernels.serving.tables import find_files, units_of  # noqa: E402

ROWS = texts(40)
ROOT = Path(__file__).resolve().parents[2]
SECONDS = 300


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("model"), ROWS)


def parquet(path, rows=ROWS, start=0, columns=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = range(start, start + len(rows))
    pq.write_table(pa.table({"id": ids, "text": rows, **(columns or {})}), path, **options)
    return path


def names(*patterns):
    return [Path(unit.path).name for unit in find_files([str(pattern) for pattern in patterns])]


def rows_of(path):
    return [row for unit in units_of(*find_files([str(path)])) for table in unit.tables() for row in table.to_pylist()]


def command(saved, tmp_path, *more):
    return ["predict", str(saved), str(tmp_path / "in"), "--output", str(tmp_path / "out"), *more]


def outputs(tmp_path):
    return sorted((tmp_path / "out").glob("*.parquet"))


def scored(tmp_path):
    return [row for path in outputs(tmp_path) for row in pq.read_table(path).to_pylist()]


def test_patterns(tmp_path):
    for name in ("a/1.parquet", "a/2.parquet", "a/deep/3.parquet", "b/_temporary/4.parquet", "b/5 [x].parquet"):
        parquet(tmp_path / name)
    (tmp_path / "a" / "_SUCCESS").touch()
    (tmp_path / "a" / "notes.txt").touch()
    assert names(tmp_path) == ["1.parquet", "2.parquet", "3.parquet", "5 [x].parquet"]
    assert names(tmp_path / "a" / "*.parquet") == ["1.parquet", "2.parquet"]
    assert names(tmp_path / "**" / "[23].parquet") == ["2.parquet", "3.parquet"]
    assert names(tmp_path / "b" / "5 [x].parquet", tmp_path / "b") == ["5 [x].parquet"]
    assert names(f"file://{tmp_path}/a/?.parquet") == ["1.parquet", "2.parquet"]
    assert names(f"file://{tmp_path}/a/?.parquet?use_mmap=true") == ["1.parquet", "2.parquet"]
    with pytest.raises(ValueError, match="use_mmap"):
        names(f"file://{tmp_path}/a?use_mmap=neither")
    for wrong in (tmp_path / "none", tmp_path / "*.csv", tmp_path / "a" / "1.parquet" / "*"):
        with pytest.raises(FileNotFoundError, match="names none"):
            names(wrong)
    with pytest.raises(ValueError, match=r"expected files that end in .*notes.txt"):
        names(tmp_path / "a" / "*")
    with pytest.raises(ValueError, match="unknown"):
        names("unknown://bucket/*.parquet")


def test_rows_of_every_format(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "CHUNK_ROWS", 10)
    monkeypatch.setattr(tables, "UNIT_ROWS", 20)
    rows = [*ROWS, 'two\nlines, and "quotes"', "ä", ""]
    parquet(tmp_path / "a.parquet", rows, row_group_size=7)
    with (tmp_path / "a.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([["id", "text"], [], *enumerate(rows)])
    with (tmp_path / "a.jsonl").open("w") as file:
        file.writelines(json.dumps({"id": at, "text": row}) + "\n\n" for at, row in enumerate(rows))
    (tmp_path / "a.tsv").write_text('id\ttext\n007\tsaid "so\nNA\t\n')
    expected = [{"id": number, "text": row} for number, row in enumerate(rows)]
    assert rows_of(tmp_path / "a.parquet") == rows_of(tmp_path / "a.jsonl") == expected
    assert rows_of(tmp_path / "a.csv") == [{**row, "id": str(row["id"])} for row in expected]
    assert rows_of(tmp_path / "a.tsv") == [{"id": "007", "text": 'said "so'}, {"id": "NA", "text": ""}]
    units = units_of(*find_files([str(tmp_path / "a.parquet")]))
    assert [(unit.first, len(unit.groups)) for unit in units] == [(0, 2), (14, 2), (28, 3)]
    assert sorted(unit.name for unit in units) == [unit.name for unit in units]


def test_json_lines_have_the_columns_and_types_of_all_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "CHUNK_ROWS", 2)
    lines = [{"text": "a", "n": 1}, {"text": "2024-01-02"}, {"text": "b", "n": 2.5}, {"text": "c", "late": [1]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    empty = {"text": None, "n": None, "late": None}
    assert rows_of(tmp_path / "a.jsonl") == [{**empty, **line} for line in lines]


#: Contents of files that cannot be read -> words of the reason.
DAMAGED = {
    "quote.csv": ('id,text\n1,"good\n0,bad\n', "line 3: unexpected end of data"),
    "cells.csv": ("id,text\n1,good,2\n", "line 2: expected 2 cells, got 3"),
    "twice.csv": ("text,text\n1,2\n", "got 'text' twice"),
    "latin.csv": (b"id,text\n1,\xe9\n", "utf-8"),
    "no_text.csv": ("id,review\n1,good\n", "expected a column 'text', got id, review"),
    "reserved.csv": (
        "text,label,predicted_label\na,b,c\n",
        "column 'predicted_label', which the answers would replace",
    ),
    "array.jsonl": ('{"text": "a"}\n[1]\n', "line 2: expected a JSON object, got list"),
    "nested.jsonl": ("[" * 100_000 + "\n", "line 1: expected a JSON object"),
    "big.jsonl": ('{"text": "a", "id": 123456789012345678901234567890}\n', "int"),
    "torn.parquet": (b"PAR1 half", "Parquet"),
}


def test_files_that_cannot_be_read_are_named_at_the_end(saved, tmp_path, capsys):
    parquet(tmp_path / "in" / "good.parquet")
    for name, (contents, _) in DAMAGED.items():
        (tmp_path / "in" / name).write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    assert main(command(saved, tmp_path)) == 2
    printed, errors = capsys.readouterr()
    assert printed == f"{tmp_path / 'out'}: 40 rows in 1 file(s)\n"
    for name, (_, reason) in DAMAGED.items():
        (line,) = [line for line in errors.splitlines() if line.startswith(f"error: {tmp_path / 'in' / name}: ")]
        assert reason in line
    assert [row["id"] for row in scored(tmp_path)] == list(range(40)) and len(list((tmp_path / "out").iterdir())) == 2
    shutil.copy(tmp_path / "in" / "good.parquet", tmp_path / "in" / "torn.parquet")  # repaired
    assert main(command(saved, tmp_path)) == 2
    assert len(outputs(tmp_path)) == 2


def test_answers_are_those_of_a_scorer(saved, tmp_path, capsys):
    rows = [*ROWS, "", None]
    parquet(tmp_path / "in" / "a.parquet", rows)
    assert main(command(saved, tmp_path)) == 0
    assert "42 rows in 1 file(s), 2 of them without an answer" in capsys.readouterr().out
    found, wanted = pq.read_table(*outputs(tmp_path)), ee.Scorer(str(saved), bad_rows="report")(rows)
    assert pq.read_table(tmp_path / "out").num_rows == 42, "a folder is a data set"
    assert found.column_names == ["id", "text", "label", "score", "exit_layer", "error"]
    for name in ("label", "exit_layer", "error"):
        assert found[name].to_pylist() == wanted[name]
    assert found["score"].to_pylist()[:40] == pytest.approx(wanted["score"][:40], abs=1e-5)
    assert found["label"].to_pylist()[40:] == ["", ""] and math.isnan(found["score"][40].as_py())


def test_columns_of_the_same_names_are_kept(saved, tmp_path):
    parquet(tmp_path / "in" / "a.parquet", columns={"label": ["mine"] * 40})
    assert main(command(saved, tmp_path)) == 0
    row = scored(tmp_path)[0]
    assert row["label"] == "mine" and row["predicted_label"] and row["predicted_exit_layer"] >= 1
    assert "score" not in row and row["predicted_error"] == ""


def test_a_run_goes_on_and_refuses_what_has_changed(saved, tmp_path, capsys, monkeypatch):
    for number in range(3):
        parquet(tmp_path / "in" / f"{number}.parquet", start=40 * number)
    assert main(command(saved, tmp_path)) == 0
    first, second, _ = outputs(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in outputs(tmp_path)}
    second.write_bytes(second.read_bytes()[:-20])  # torn, as by a machine that lost its power
    parquet(tmp_path / "in" / "3.parquet", start=120)
    old = tmp_path / "out" / ".0.parquet.old"
    old.touch()
    os.utime(old, (0, 0))
    assert main(command(saved, tmp_path)) == 0
    assert [row["id"] for row in scored(tmp_path)] == list(range(160)) and not old.exists()
    kept = {path for path in times if path.stat().st_mtime_ns == times[path]}
    assert kept == {*times} - {second}

    message = error_of(capsys, command(saved, tmp_path, "--no-truncate"))
    assert "another truncate" in message
    other = saved_model(tmp_path / "other", ROWS[:20])
    assert "another model" in error_of(capsys, command(other, tmp_path))
    parquet(tmp_path / "in" / "0.parquet", ROWS[:20])
    message = error_of(capsys, command(saved, tmp_path))
    assert f"{tmp_path / 'in' / '0.parquet'} has changed since its rows were written to {first}" in message
    assert main(command(saved, tmp_path, "--overwrite")) == 0 and len(scored(tmp_path)) == 140


def test_a_full_disk_ends_the_run(saved, tmp_path, capsys, monkeypatch):
    parquet(tmp_path / "in" / "a.parquet")
    parquet(tmp_path / "in" / "b.parquet")

    class Full(pq.ParquetWriter):
        def write_table(self, table):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(files.pa.parquet, "ParquetWriter", Full)
        message = error_of(capsys, command(saved, tmp_path))
    assert f"{tmp_path / 'out'}" in message and message.endswith("could not be written: No space left on device")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["_run.json"]
    assert main(command(saved, tmp_path)) == 0 and len(scored(tmp_path)) == 80


def test_errors(saved, tmp_path, capsys, monkeypatch):
    assert "names none" in error_of(capsys, command(saved, tmp_path))
    assert "expected a folder with a saved model" in error_of(capsys, command(tmp_path / "none", tmp_path))
    parquet(tmp_path / "in" / "a.parquet")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    assert "expected a new folder, or that of an earlier run" in error_of(capsys, command(saved, tmp_path))
    monkeypatch.setattr("earlyexit_cli.files.find_spec", lambda name: None if name == "ray" else object())
    message = error_of(capsys, command(saved, tmp_path, "--workers", "2"))
    assert message.endswith("--workers requires packages that are not installed: `pip install ray[data]`")


def workers_of(pid):
    """Process ids of the workers of Ray that a process has started."""
    listed = subprocess.check_output(["ps", "-eo", "pid,args"], text=True).splitlines()
    found = [int(line.split()[0]) for line in listed if "ray::MapWorker" in line]
    return [one for one in found if f"EARLYEXIT_TEST={pid}".encode() in Path(f"/proc/{one}/environ").read_bytes()]


@pytest.mark.thorough
def test_every_row_once_where_workers_are_killed(saved, tmp_path):
    """20 files of some thousand rows, two workers of which are killed, and then the run; the next one goes on."""
    pytest.importorskip("ray")
    rows = texts(2000, seed=1)
    for number in range(20):
        parquet(tmp_path / "in" / f"{number:02}.parquet", rows, start=2000 * number)
    arguments = [sys.executable, "-m", "earlyexit_kernels", *command(saved, tmp_path, "--workers", "2")]
    environment = {**os.environ, "EARLYEXIT_TEST": str(os.getpid())}

    def until(running, condition):
        end = time.monotonic() + SECONDS
        while not (value := condition()):
            assert running.poll() is None and time.monotonic() < end, running.communicate()
            time.sleep(0.01)
        return value

    running = subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until(running, lambda: len(outputs(tmp_path)) >= 2)
    for pid in until(running, lambda: workers_of(os.getpid())):
        os.kill(pid, signal.SIGKILL)
    before = len(outputs(tmp_path))
    until(running, lambda: len(outputs(tmp_path)) > before + 1)  # others have gone on
    running.kill()
    running.communicate()
    assert 3 < len(outputs(tmp_path)) < 20
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    assert [row["id"] for row in scored(tmp_path)] == list(range(40_000))
    assert "of 20 units were finished before" in done.stdout
