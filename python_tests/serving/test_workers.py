"""The processes of a server: workers that end are replaced, failed loads end it, and SIGTERM drains it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from support.commands import error_of
from support.faulty_model import ORDERS
from support.registered_rules import RULE_IN_A_MODULE
from support.servers import ROOT, Command, client_of, counted, until
from support.text_models import saved_model, texts

import earlyexit_kernels as ee

ROWS = texts(40)
SLOW, END = (f"the {ORDERS[order]}" for order in ("slow", "end"))
FAULTY = str(ROOT / "python_tests" / "support" / "faulty_server.py")
SERVE = ("-m", "earlyexit_kernels", "serve")


@pytest.fixture
def running():
    started = []

    def start(*arguments):
        started.append(Command(*arguments))
        return started[-1]

    yield start
    for command in started:
        command.kill()


def ask(client, text):
    """Return the status of a request, or None where the connection broke."""
    try:
        return client.post("/predict", json={"inputs": text}).status_code
    except httpx.TransportError:
        return None


def refuses(url):
    """Whether a server refuses connections, rather than letting them wait."""
    address = httpx.URL(url)
    try:
        socket.create_connection((address.host, address.port), timeout=1).close()
    except ConnectionRefusedError:
        return True
    return False


def test_workers_that_end_are_replaced_and_sigterm_drains(running):
    """One server of two workers, as it takes seconds to start."""
    command = running(FAULTY, json.dumps({"workers": 2, "max_tokens": 20}))
    limits = httpx.Limits(max_keepalive_connections=0)  # a new connection goes to either worker
    with client_of(command.url, limits=limits) as client:
        until(lambda: counted(client, "workers_ready") == 2)
        for _ in range(20):
            assert ask(client, ["the plot was dull"] * 5) == 200
        assert counted(client, "rows_total") == 100 and counted(client, "worker_starts_total") == 2
        pids = command.workers
        assert ask(client, END) is None
        assert ask(client, "a") == 200, "the other worker answers"
        until(lambda: counted(client, "worker_starts_total") == 3 and counted(client, "workers_ready") == 2)
        assert len(set(pids) & set(command.workers)) == 1
        assert counted(client, "rows_total") == 101, "counts outlive the workers"
        pids = command.workers
        with ThreadPoolExecutor(4) as threads:
            asked = [threads.submit(ask, client, [SLOW] * 100) for _ in range(4)]
            until(lambda: counted(client, "queue_rows") > 0)
            command.process.send_signal(signal.SIGTERM)
            until(lambda: refuses(command.url))
            assert not all(one.done() for one in asked), "new connections are refused while requests are under way"
            code, errors = command.ended()
            assert [one.result() for one in asked] == [200] * 4
    assert code == 0, errors
    assert re.search(r"worker \d+ has ended with exit code \d+; worker \d+ replaces it", errors)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{command.url}/health")


def test_a_model_that_is_saved_again_is_not_mixed_in(running, tmp_path):
    saved_model(tmp_path, ROWS)
    command = running(*SERVE, str(tmp_path), "--port", "0")
    model = ee.EarlyExitForSequenceClassification.from_pretrained(tmp_path)
    for part in (f"serving {tmp_path} at http://127.0.0.1:", str(model.criterion), "not calibrated, 1 worker(s)"):
        assert part in command.line
    with client_of(command.url) as client:
        found = client.post("/predict", json={"inputs": ROWS}).json()
        wanted = ee.Scorer(str(tmp_path))(ROWS)
        assert [one[0]["label"] for one in found] == wanted["label"]
        assert [one[0]["exit_layer"] for one in found] == wanted["exit_layer"]
        model.set_criterion(None)
        model.save_pretrained(tmp_path)
        os.kill(command.workers[0], signal.SIGKILL)
    code, errors = command.ended()
    assert code == 2 and "has been saved again" in errors and "Traceback" not in errors
    assert errors.startswith(f"loading {tmp_path} in 1 worker(s)\n")


def test_a_model_that_cannot_be_loaded_ends_the_server(running, tmp_path):
    saved_model(tmp_path, ROWS)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    command = running(*SERVE, str(tmp_path), "--port", "0", "--workers", "2")
    code, errors = command.ended()
    assert code == 2 and command.line == "" and f"error: a worker cannot serve {tmp_path}: " in errors
    assert "Traceback" not in errors


@pytest.mark.thorough
def test_each_worker_imports_the_criteria_of_a_user(running, tmp_path, monkeypatch):
    saved_model(tmp_path, ROWS)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"criterion": {"name": "imported_rule"}}))
    (tmp_path / "my_rules.py").write_text(RULE_IN_A_MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    command = running(*SERVE, str(tmp_path), "--port", "0", "--import", "my_rules")
    with client_of(command.url) as client:
        found = client.post("/predict", json={"inputs": ROWS}).json()
    assert [one[0]["exit_layer"] for one in found] == [1] * len(ROWS)


@pytest.mark.thorough
def test_workers_end_with_their_supervisor(running):
    command = running(FAULTY, "{}")
    (pid,) = command.workers
    command.process.kill()
    until(lambda: not Path(f"/proc/{pid}").exists())


def test_errors_of_the_command(capsys, tmp_path, monkeypatch):
    assert "expected a folder with a saved model" in error_of(capsys, ["serve", str(tmp_path / "none")])
    assert "has no config.json" in error_of(capsys, ["serve", str(tmp_path)])
    saved_model(tmp_path, ROWS)
    assert "--port: expected a whole number in" in error_of(capsys, ["serve", str(tmp_path), "--port", "70000"])
    message = error_of(capsys, ["serve", str(tmp_path), "--max-inputs", "10", "--max-queue", "5"])
    assert "--max-inputs: expected at most --max-queue = 5, got 10" in message
    with socket.create_server(("127.0.0.1", 0)) as taken:
        message = error_of(capsys, ["serve", str(tmp_path), "--port", str(taken.getsockname()[1])])
        assert "--port: cannot listen at" in message and "choose another port" in message
    monkeypatch.setattr("earlyexit_cli.files.find_spec", lambda name: None if name == "uvicorn" else object())
    message = error_of(capsys, ["serve", str(tmp_path)])
    assert message.endswith("serve requires packages that are not installed: `pip install uvicorn`")
    monkeypatch.undo()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config["backbone_config"]))
    assert "expected a model with exits" in error_of(capsys, ["serve", str(tmp_path), "--port", "0"])
