"""`earlyexit serve` as a command: the real model over a real socket, the drain at SIGTERM, and its errors."""

from __future__ import annotations

import os
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import numpy as np
import pytest
from support.commands import error_of
from support.servers import Command, client_of

import earlyexit_kernels as ee
from earlyexit_kernels.cli import inputs, serve
from earlyexit_kernels.data import toy
from earlyexit_kernels.serving.http.settings import Settings

TEXTS = [row.text for row in toy.write_splits(train_rows=0, dev_rows=900, test_rows=0)["dev"]]
#: Words on which the model of the workers raises, and gives NaN.
RAISES, GIVES_NAN = "the opera was dull .", "the record was dull ."


def plain(text):
    return not {"opera", "record"} & set(text.split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of which rows leave at several layers, with a calibration."""
    path = tmp_path_factory.mktemp("model")
    words = toy.toy_tokenizer()
    model = ee.to_early_exit(toy.toy_model(layers=4, hidden=16), pooling="mean").eval()
    rows = [words(text) for text in TEXTS[:600]]
    found = ee.calibrate(model, rows, target=ee.SpeedUp(1.5))
    sure = ee.collect_trace(model, rows)[0].logits[:, 0].softmax(dim=-1).amax(dim=-1)
    rule = ee.criteria.MaxProbability(threshold=float(sure.median()))  # half of the rows leave at layer 1
    model.set_criterion(rule)
    layers = ee.predict_with_exits(model, rows).exit_layer
    shares = tuple((np.bincount(layers, minlength=5)[1:] / len(layers)).tolist())
    replace(found, criterion=rule, exit_shares=shares).apply(model)
    model.save_pretrained(path)
    words.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return ee.EarlyExitForSequenceClassification.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def command(folder):
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    pytest.importorskip("prometheus_client")
    running = Command(folder, "--min-threshold", "0.1", "--max-threshold", "0.9")
    yield running
    if running.process.poll() is None:
        running.process.kill()
        running.process.communicate()


@pytest.fixture(scope="module")
def client(command):
    with client_of(command.url, limits=httpx.Limits(max_connections=64)) as found:
        yield found


@pytest.mark.thorough
def test_startup_line(command, folder, model):
    assert command.line.startswith(f"serving {folder} at http://127.0.0.1:")
    for part in ("method joint", str(model.criterion), "calibrated for", "4 layers"):
        assert part in command.line


def test_answers_are_those_of_a_scorer(client, model):
    texts = [text for text in TEXTS[600:] if plain(text)]
    found = client.post("/predict", json={"inputs": texts[:150]}).json()
    wanted = ee.Scorer(model, toy.toy_tokenizer())(texts[:150])
    assert [one[0]["label"] for one in found] == wanted["label"]
    assert [one[0]["exit_layer"] for one in found] == wanted["exit_layer"]
    assert [one[0]["score"] for one in found] == pytest.approx(wanted["score"], abs=1e-5)
    assert len(set(wanted["exit_layer"])) >= 2


def test_a_threshold_of_the_request(client, model):
    inputs = [text for text in TEXTS[600:] if plain(text)][:40]
    usual = client.post("/predict", json={"inputs": inputs}).json()
    layers = {}
    for threshold in (0.1, 0.9):
        found = client.post("/predict", json={"inputs": inputs, "threshold": threshold}).json()
        layers[threshold] = sum(one[0]["exit_layer"] for one in found)
    assert layers[0.1] != layers[0.9] and len(usual) == 40
    refused = client.post("/predict", json={"inputs": inputs, "threshold": 0.95})
    assert refused.status_code == 422 and "expected a number in [0.1, 0.9], got 0.95" in refused.text


def test_rows_on_which_the_model_fails(client):
    inputs = [text for text in TEXTS[600:] if plain(text)][:6]
    usual = client.post("/predict", json={"inputs": inputs}).json()
    mixed = [*inputs[:3], RAISES, GIVES_NAN, *inputs[3:]]
    found = client.post("/predict", json={"inputs": mixed})
    assert found.status_code == 200 and "secret" not in found.text
    answers = found.json()
    assert [set(one) for one in answers[3:5]] == [{"error", "error_type"}] * 2
    kept = answers[:3] + answers[5:]
    assert [one[0]["exit_layer"] for one in kept] == [one[0]["exit_layer"] for one in usual]
    assert [one[0]["score"] for one in kept] == pytest.approx([one[0]["score"] for one in usual], abs=1e-5)
    for text in (RAISES, GIVES_NAN):
        assert client.post("/predict", json={"inputs": text}).status_code == 424


def test_metrics_compare_with_the_calibration(client, model):
    text = client.get("/metrics").text
    for layer, share in enumerate(ee.Calibration.of(model).exit_shares, start=1):
        assert f'earlyexit_exit_share{{exit_layer="{layer}",rows="calibration"}} {share}' in text
        assert f'earlyexit_exit_share{{exit_layer="{layer}",rows="recent"}}' in text
    assert "earlyexit_exit_drift 0.0" in text and "earlyexit_failed_rows_total" in text
    info = client.get("/info").json()
    assert info["calibration"]["mean_exit_layer"] == ee.Calibration.of(model).mean_exit_layer
    assert info["limits"]["max_threshold"] == 0.9


def test_drain(client, command):
    """The last test of the command: requests under way are answered, and it ends with code 0."""
    inputs = [text for text in TEXTS if plain(text)][:200]
    before = client.get("/metrics.json").json()["rows"]
    workers = command.workers
    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(client.post, "/predict", json={"inputs": inputs}) for _ in range(8)]
        while client.get("/metrics.json").json()["rows"] == before:
            time.sleep(0.005)
        code, errors = command.end()
        for one in asked:  # a connection that came too late was closed
            try:
                assert one.result().status_code == 200 and len(one.result().json()) == 200
            except httpx.TransportError:
                continue
        assert asked[0].result().status_code == 200
    assert code == 0, errors
    assert (
        "secret of the server" in errors and "Traceback (most recent call last)" not in errors.partition("worker:")[0]
    )
    for pid in workers:
        assert not os.path.exists(f"/proc/{pid}")
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{command.url}/health")


def test_errors(capsys, tmp_path, folder, monkeypatch):
    assert "expected a folder with a saved model" in error_of(capsys, ["serve", str(tmp_path / "none")])
    assert "--port: expected a whole number in [0, 65535]" in error_of(
        capsys, ["serve", str(folder), "--port", "70000"]
    )
    message = error_of(capsys, ["serve", str(folder), "--max-inputs", "10", "--max-queue", "5"])
    assert "--max-inputs: expected at most --max-queue = 5, got 10" in message
    message = error_of(capsys, ["serve", str(folder), "--min-threshold", "0.5"])
    assert "expected both, the smaller one first" in message
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.setattr(inputs, "find_spec", lambda name: None if name == "uvicorn" else object())
    message = error_of(capsys, ["serve", str(folder)])
    assert message.endswith("serve requires packages that are not installed: `pip install uvicorn`")


def test_a_folder_without_a_tokenizer_and_a_taken_port(capsys, tmp_path, folder):
    pytest.importorskip("fastapi")
    (tmp_path / "empty").mkdir()
    assert error_of(capsys, ["serve", str(tmp_path / "empty"), "--port", "0"]).startswith("error: ")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        message = error_of(capsys, ["serve", str(folder), "--port", str(taken.getsockname()[1])])
        assert "address already in use" in message


def test_keys(tmp_path, monkeypatch):
    file = tmp_path / "key"
    monkeypatch.delenv(serve.KEY_VARIABLE, raising=False)
    assert serve.api_key(None) is None
    file.write_text(" secret \n")
    assert serve.api_key(file) == "secret" and "secret" not in repr(Settings(model=tmp_path, api_key="secret"))
    monkeypatch.setenv(serve.KEY_VARIABLE, "other")
    assert serve.api_key(None) == "other"
    with pytest.raises(ValueError, match="got both"):
        serve.api_key(file)
    for wrong in ("", " ", "two words", "schlüssel"):
        monkeypatch.setenv(serve.KEY_VARIABLE, wrong)
        with pytest.raises(ValueError, match="EARLYEXIT_API_KEY: expected a key"):
            serve.api_key(None)
