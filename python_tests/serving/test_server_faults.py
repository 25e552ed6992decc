"""The server over a real socket: too many requests, slow and vanishing clients, workers that end or hang."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from urllib.parse import urlsplit

import httpx
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from support.fake_worker import NOTE, SLOW_SECONDS
from support.servers import ORDERS, SECONDS, client_of, fake_server, fake_workers

from earlyexit_kernels.data import toy
from earlyexit_kernels.serving.http import pool, worker_process

SLOW, END, HANG = (f"the {ORDERS[order]}" for order in ("slow", "end", "hang"))
#: Tokens of five `SLOW`, in two batches of which a worker holds ten rows.
TOKENS = 20
HELD = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    toy.toy_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def quick(monkeypatch):
    """Look often, start workers again at once, and end those that hang."""
    monkeypatch.setattr(worker_process, "END_SECONDS", 0.5)
    monkeypatch.setattr(pool, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(pool, "RETRY_SECONDS", (0.05, 0.1))


def until(condition):
    """Wait for a condition, and return its value."""
    end = time.monotonic() + SECONDS
    while not (value := condition()):
        assert time.monotonic() < end, "the condition has not become true"
        time.sleep(0.01)
    return value


def numbers(client):
    return client.get("/metrics.json").json()


def connection(url):
    at = urlsplit(url)
    return socket.create_connection((at.hostname, at.port), timeout=SECONDS)


def received(connected):
    """Return all that a server sends before it closes the connection."""
    return b"".join(iter(lambda: connected.recv(2**16), b""))


def request_of(inputs):
    body = json.dumps({"inputs": inputs}).encode()
    return b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


def test_rate_is_limited_for_each_client(folder):
    with fake_server(folder, rate_limit=0.01) as url:
        first, second = (
            client_of(url, transport=httpx.HTTPTransport(local_address=address))
            for address in ("127.0.0.1", "127.0.0.2")
        )
        with first, second:
            assert first.post("/predict", json={"inputs": "a"}).status_code == 200
            refused = first.post("/predict", json={"inputs": "a"})
            assert refused.status_code == 429 and refused.json()["error_type"] == "Overloaded"
            assert 90 <= int(refused.headers["retry-after"]) <= 100
            assert first.get("/health").status_code == 200
            assert second.post("/predict", json={"inputs": "a"}).status_code == 200


def test_full_queue(folder, quick):
    with (
        fake_server(folder, max_queue=12, max_inputs=12, max_tokens=TOKENS) as url,
        client_of(url) as client,
        ExitStack() as stack,
    ):
        for inputs in ([HANG, SLOW, SLOW, SLOW], [SLOW] * 4, [SLOW] * 4):
            stack.enter_context(connection(url)).sendall(request_of(inputs))
        until(lambda: numbers(client)["queue_rows"] == 12 - HELD)
        refused = client.post("/predict", json={"inputs": [SLOW] * (HELD + 1)})
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        assert "queue is full" in refused.json()["error"]
        stack.close()
        until(lambda: numbers(client)["queue_rows"] == 0)


def test_rows_that_wait_too_long(folder, quick):
    with fake_server(folder, max_tokens=TOKENS, max_wait_ms=20_000 * SLOW_SECONDS) as url, client_of(url) as client:
        late = client.post("/predict", json={"inputs": [SLOW] * 6 * HELD})
        assert late.status_code == 503 and "waited too long" in late.json()["error"]
        until(lambda: client.post("/predict", json={"inputs": "a"}).status_code == 200)
        assert numbers(client)["rows"] < 5 * HELD


def test_rows_of_a_client_that_has_gone_are_dropped(folder):
    with fake_server(folder, max_tokens=TOKENS) as url, client_of(url) as client:
        with connection(url) as gone:
            gone.sendall(request_of([SLOW] * 200))
            until(lambda: numbers(client)["rows"] >= 1)
        assert client.post("/predict", json={"inputs": "a"}).status_code == 200
        now = numbers(client)
        assert now["queue_rows"] == 0 and now["rows"] < 100
        assert until(lambda: numbers(client)["requests"].get("499")) == 1


def test_client_that_has_gone_while_lines_are_sent(folder):
    accept = {"Accept": "application/x-ndjson"}
    with fake_server(folder, max_tokens=TOKENS) as url, client_of(url) as client:
        with client.stream("POST", "/predict", json={"inputs": [SLOW] * 200}, headers=accept) as got:
            next(got.iter_lines())
        assert client.post("/predict", json={"inputs": "a"}).status_code == 200
        assert numbers(client)["rows"] < 100


def test_half_requests(folder):
    """Of a client that has gone, and of a slow one."""
    with fake_server(folder, body_seconds=0.2) as url, client_of(url) as client:
        whole = request_of("a")
        with connection(url) as half:
            half.sendall(whole[:-3])
        with connection(url) as slow:
            slow.sendall(whole[:-3])
            answer = received(slow)
            assert answer.startswith(b"HTTP/1.1 408 ") and b"within 0.2 s" in answer
        with connection(url) as wrong:
            wrong.sendall(b"no HTTP\r\n\r\n")
            assert received(wrong).startswith(b"HTTP/1.1 400 ")
        assert client.post("/predict", json={"inputs": "a"}).status_code == 200


def test_client_that_does_not_read(folder):
    """Its answer waits in its socket; others are answered."""
    with fake_server(folder, body_seconds=0.5, max_queue=10_000) as url, client_of(url) as client:
        with connection(url) as lazy:
            lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            for _ in range(20):
                lazy.sendall(request_of(["the plot was dull"] * 256))
            for _ in range(5):
                assert client.post("/predict", json={"inputs": "a"}).status_code == 200
        until(lambda: numbers(client)["queue_rows"] == 0)


def test_worker_that_is_killed_under_load(folder, quick):
    """Its rows get 503, another is started, and nothing hangs."""
    with (
        fake_server(folder, workers=2, max_tokens=TOKENS) as url,
        client_of(url, limits=httpx.Limits(max_connections=64)) as client,
        ThreadPoolExecutor(64) as threads,
    ):
        asked = [threads.submit(client.post, "/predict", json={"inputs": [SLOW] * 2}) for _ in range(12)]
        until(lambda: numbers(client)["rows"])
        os.kill(fake_workers()[0], signal.SIGKILL)
        assert client.get("/health").status_code == 200, "the other worker takes rows"
        asked += [threads.submit(client.post, "/predict", json={"inputs": [SLOW] * 2}) for _ in range(12)]
        answers = [one.result() for one in asked]
        assert {one.status_code for one in answers} == {200, 503}
        for lost in [one for one in answers if one.status_code == 503]:
            assert lost.headers["retry-after"] == "1"
            assert "the worker that had this input has ended" in lost.json()["error"]
        until(lambda: client.get("/health").json()["workers_ready"] == 2)
        assert numbers(client)["restarts"] == 1
        failed = re.search(r"earlyexit_failed_rows_total (\d+)", client.get("/metrics").text)
        assert failed is not None and int(failed[1]) >= 1
        assert client.post("/predict", json={"inputs": ["a"] * 20}).status_code == 200


def test_lost_rows_among_lines(folder, quick):
    accept = {"Accept": "application/x-ndjson"}
    with fake_server(folder) as url, client_of(url) as client:
        lines = client.post("/predict", json={"inputs": ["a", END, "a"]}, headers=accept).text.splitlines()
        found = {one["index"]: one.get("error_type", "answered") for one in map(json.loads, lines)}
        assert sorted(found) == [0, 1, 2] and found[1] == found[2] == "Unhealthy"


def test_worker_that_hangs_is_replaced(folder, quick):
    with fake_server(folder, stalled_seconds=1.0) as url, client_of(url) as client:
        lost = client.post("/predict", json={"inputs": HANG})
        assert lost.status_code == 503
        until(lambda: client.get("/health").status_code == 200)
        until(lambda: client.post("/predict", json={"inputs": SLOW}).status_code == 200)


def test_workers_of_another_model_are_not_mixed_in(tmp_path, quick, caplog):
    """A worker that is started again loads the folder again."""
    toy.toy_tokenizer().save_pretrained(tmp_path)
    with fake_server(tmp_path, workers=2) as url, client_of(url) as client:
        info = client.get("/info").json()
        (tmp_path / NOTE).write_text("saved again")
        assert client.post("/predict", json={"inputs": END}).status_code == 503
        until(lambda: "has changed; restart the server" in caplog.text)
        assert client.get("/health").json()["workers_ready"] == 1 and client.get("/info").json() == info
        (tmp_path / NOTE).unlink()
        until(lambda: client.get("/health").status_code == 200)


def test_health_without_a_worker(folder, quick, monkeypatch):
    """Requests wait for the next worker, but not for ever."""
    with fake_server(folder, max_wait_ms=300.0) as url, client_of(url) as client:
        monkeypatch.setattr(pool, "RETRY_SECONDS", (SECONDS, SECONDS))
        worker_process.WORKER = ("-c", "raise SystemExit(3)")
        assert client.post("/predict", json={"inputs": END}).status_code == 503
        until(lambda: client.get("/health").status_code == 503)
        refused = client.post("/predict", json={"inputs": "a"})
        assert refused.status_code == 503 and "waited too long" in refused.json()["error"]
