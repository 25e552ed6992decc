"""`earlyexit score` on a small Ray: answers, resuming after SIGKILL, files that cannot be read, and its errors."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

pa = pytest.importorskip("pyarrow")
ray = pytest.importorskip("ray")
import pyarrow.parquet as pq  # noqa: E402
from support.commands import error_of  # noqa: E402
from support.text_models import saved_model, texts  # noqa: E402

import earlyexit_kernels as ee  # noqa: E402
from earlyexit_cli import main  # noqa: E402
from earlyexit_kernels.cli import inputs  # noqa: E402
from earlyexit_kernels.serving.tables.actors import _distributed  # noqa: E402

ROWS = texts(40)
ROOT = Path(__file__).resolve().parents[2]
SECONDS = 300


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("model"), ROWS)


@pytest.fixture(scope="module")
def cluster():
    """Ray with two cores, which the commands of this process use."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    options = {"include_dashboard": False, "object_store_memory": 100 * 2**20, "logging_level": "ERROR"}
    ray.init("local", num_cpus=2, log_to_driver=False, **options)
    yield
    ray.shutdown()


def parquet(path, rows, start=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": range(start, start + len(rows)), "text": rows}), path)


def command(saved, tmp_path, *more):
    return ["score", "--model", str(saved), "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), *more]


def lines_of(scored):
    return [row for name in sorted(os.listdir(scored)) for row in pq.read_table(scored / name).to_pylist()]


@pytest.mark.thorough
def test_killed_then_a_full_disk_then_finished(saved, tmp_path, cluster, capfd):
    """One table in 40 files: its first one is CSV, the second one is damaged, the last one has a row without text."""
    rows, table, output = texts(100, seed=1), tmp_path / "in", tmp_path / "out"
    scored, last = output / "scored", "000039-39-000000000000.parquet"
    for number in range(40):
        parquet(table / f"{number:02}.parquet", [*rows[:-1], None if number == 39 else rows[-1]], start=number * 100)
    (table / "00.parquet").unlink()
    with (table / "00.csv").open("x", newline="") as file:
        csv.writer(file).writerows([["id", "text"], *enumerate(rows)])
    (table / "01.parquet").write_bytes(b"no Parquet file")

    arguments = [sys.executable, "-m", "earlyexit_kernels", *command(saved, tmp_path, "--workers", "1")]
    running = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + SECONDS
    while len(list(scored.glob("*.parquet"))) < 3:
        assert running.poll() is None and time.monotonic() < end, running.communicate()
        time.sleep(0.005)
    running.send_signal(signal.SIGKILL)
    assert running.communicate()[0] == ""
    assert len(list(scored.glob("*.parquet"))) < 39 and not (scored / last).exists()
    stamps = {path.name: path.stat().st_mtime_ns for path in scored.glob("*.parquet")}

    (output / "errors" / last).mkdir()  # so that the last block cannot be written
    message = error_of(capfd, command(saved, tmp_path, "--workers", "1"))
    assert f"{output / 'errors' / last} could not be written: Is a directory" in message
    assert len(list(scored.glob("*.parquet"))) == 38 and not (scored / last).exists()

    (output / "errors" / last).rmdir()
    assert main(command(saved, tmp_path)) == 2
    printed, errors = capfd.readouterr()
    assert printed == f"{output}: 3899 rows in scored, 1 in errors (38 of 39 blocks were finished before)\n"
    (failed,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert failed.startswith(f"error: {table / '01.parquet'}: ")
    found = lines_of(scored)
    assert [int(row["id"]) for row in found] == [*range(100), *range(200, 3999)]
    wanted = ee.Scorer(str(saved))(rows)
    for start in (0, 100):
        assert [row["text"] for row in found[start : start + 100]] == rows
        assert [row["label"] for row in found[start : start + 100]] == wanted["label"]
        assert [row["exit_layer"] for row in found[start : start + 100]] == wanted["exit_layer"]
        assert [row["score"] for row in found[start : start + 100]] == pytest.approx(wanted["score"], abs=1e-5)
    assert lines_of(output / "errors") == [{"id": 3999, "text": None, "error": "expected a text, got None"}]
    assert stamps.items() <= {path.name: path.stat().st_mtime_ns for path in scored.glob("*.parquet")}.items()
    assert sorted(os.listdir(output)) == [".lock", "errors", "manifest.json", "scored"]

    message = error_of(capfd, command(saved, tmp_path, "--truncate"))
    assert "since which the columns or other arguments have changed" in message
    parquet(table / "40.parquet", ROWS)
    assert "input files are others" in error_of(capfd, command(saved, tmp_path))


def test_errors(saved, tmp_path, capsys, monkeypatch):
    assert "names none" in error_of(capsys, command(saved, tmp_path))
    assert "expected a folder with a saved model" in error_of(capsys, command(tmp_path / "none", tmp_path))
    parquet(tmp_path / "in" / "a.parquet", ROWS)
    message = error_of(capsys, command(saved, tmp_path, "--text-column", "review"))
    assert "expected a column 'review', got id, text" in message and not (tmp_path / "out").exists()
    monkeypatch.setattr(inputs, "find_spec", lambda name: None if name == "ray" else object())
    message = error_of(capsys, command(saved, tmp_path))
    assert message.endswith("score requires packages that are not installed: `pip install ray[data]`")


def doomed_block(name):
    return SimpleNamespace(name=name, start=0, file=SimpleNamespace(name=f"{name}.parquet"))


def actors(*deadly):
    """One actor for each set of the blocks that kill it."""

    class Worker:
        def __init__(self, deadly):
            self.deadly = deadly

        def score(self, block):
            if block.name in self.deadly:
                os._exit(1)
            return ""

    return [ray.remote(num_cpus=0)(Worker).remote(one) for one in deadly]


def test_a_block_of_a_lost_worker_goes_to_another(cluster):
    blocks = [doomed_block(name) for name in "abcd"]
    found = [block.name for block, problem in _distributed(blocks, actors({"a"}, set())) if not problem]
    assert sorted(found) == ["a", "b", "c", "d"]


@pytest.mark.parametrize("deadly", [({"a"}, {"a"}, {"a"}), ({"a"}, {"b"})], ids=["two lost", "none left"])
def test_a_run_ends_where_workers_are_lost(cluster, deadly):
    with pytest.raises(OSError, match=r"a worker died at [ab]\.parquet, rows from 0: "):
        list(_distributed([doomed_block("a"), doomed_block("b"), doomed_block("c")], actors(*deadly)))
