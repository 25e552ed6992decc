"""`earlyexit serve --ray`: two replicas, one of which is killed under load, and the errors of its arguments."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("ray")
pytest.importorskip("fastapi")
from support.commands import error_of
from support.servers import client_of
from support.text_models import saved_model, texts

import earlyexit_kernels as ee
from earlyexit_kernels.cli import arguments

ROWS = texts(40)
ROOT = Path(__file__).resolve().parents[2]
SECONDS = 300


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("model"), ROWS)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def replicas():
    """Process ids of the replicas on this machine."""
    listed = subprocess.check_output(["ps", "-eo", "pid,args"], text=True).splitlines()
    return [int(line.split()[0]) for line in listed if "ray::ServeReplica:earlyexit" in line]


@pytest.mark.thorough
def test_a_replica_is_killed_under_load(saved):
    """The answers are those of a scorer; requests of the replica fail, none hangs, and another one is started."""
    wanted = ee.Scorer(str(saved))(ROWS)
    start = [sys.executable, "-m", "earlyexit_kernels", "serve", str(saved), "--port", str(free_port()), "--ray", "2"]
    running = subprocess.Popen(start, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = running.stdout.readline()
    assert "2 replica(s)" in line, running.communicate()
    url = next(word.rstrip(":") for word in line.split() if word.startswith("http://"))
    end = time.monotonic() + 8

    def load(number):
        found = Counter()
        with client_of(url) as client:
            while time.monotonic() < end:
                answer = client.post("/predict", json={"inputs": ROWS})
                found[answer.status_code] += 1
                if answer.status_code == 200:
                    assert [one[0]["exit_layer"] for one in answer.json()] == wanted["exit_layer"]
                    assert [one[0]["label"] for one in answer.json()] == wanted["label"]
                else:
                    assert "Traceback" not in answer.text and "/" not in answer.text
        return found

    with ThreadPoolExecutor(8) as threads:
        found = [threads.submit(load, number) for number in range(8)]
        time.sleep(2)
        before = replicas()
        os.kill(before[0], signal.SIGKILL)
        counts = sum((one.result() for one in found), Counter())
    assert set(counts) <= {200, 500, 503} and counts[500] + counts[503] <= 8 < counts[200]
    limit = time.monotonic() + SECONDS
    while len(after := replicas()) < 2:
        assert time.monotonic() < limit, "no replica was started"
        time.sleep(0.1)
    assert len(before) == 2 and before[0] not in after and before[1] in after
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=SECONDS)
    assert running.returncode == 0 and replicas() == []


@pytest.mark.parametrize(("text", "expected"), [("2", (2, 2)), ("1-8", (1, 8))])
def test_number_of_replicas(text, expected):
    assert arguments.replicas(text) == expected


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--address", "x:1"], "--address: expected --ray beside it"),
        (["--ray", "2", "--rate-limit", "5"], "--rate-limit: expected none with --ray"),
        (["--ray", "2", "--port", "0"], "--port: expected a port other than 0 with --ray"),
        (["--ray", "2", "--min-threshold", "2", "--max-threshold", "1"], "--min-threshold, --max-threshold"),
    ],
)
def test_arguments_that_do_not_fit(saved, capsys, given, words):
    assert words in error_of(capsys, ["serve", str(saved), *given])


def test_a_port_that_is_taken(saved, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert "in use" in error_of(capsys, ["serve", str(saved), "--ray", "1", "--port", port])


def test_a_model_that_cannot_be_loaded(saved, tmp_path, capsys):
    for path in saved.iterdir():
        if path.name != "model.safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    assert "is corrupt or cut short" in error_of(capsys, ["serve", str(tmp_path), "--ray", "1"])
