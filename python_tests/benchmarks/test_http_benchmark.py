"""The benchmark of the HTTP server: its clients against a server of known answers, and its tables."""

from __future__ import annotations

import asyncio
import importlib.util
import os

import pytest

pytest.importorskip("httpx")
pytest.importorskip("fastapi")
from support.servers import fake_server
from support.text_models import saved_model, texts

import earlyexit_kernels as ee
from benchmarks import harness
from benchmarks.http import arrivals, overhead, servers, tables, users
from benchmarks.http.names import FULL, LITSERVE, OWN

ROWS = texts(40)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("model"), ROWS)


def test_every_arrival_is_answered_and_timed(saved):
    with fake_server(saved) as url:
        latencies, asked = asyncio.run(arrivals.session(url, ROWS, rate=200.0, seed=0, seconds=0.5))
        same, _ = asyncio.run(arrivals.session(url, ROWS, rate=200.0, seed=0, seconds=0.5))
        assert asyncio.run(arrivals.throughput(url, ROWS, 0.3)) > 0
    assert 50 < len(latencies) == asked == len(same) < 200 and min(latencies) > 0


def test_calls_take_turns():
    order = []
    calls = {name: lambda text, name=name: order.append((text, name)) for name in "ab"}
    times = overhead.in_turns(calls, ["x", "y"])
    assert order == [("x", "a"), ("x", "b"), ("y", "a"), ("y", "b")]
    assert [len(found) for found in times.values()] == [2, 2]


def test_copy_without_a_criterion(saved, tmp_path):
    folder = servers.full_depth_copy(saved, tmp_path)
    assert ee.EarlyExitForSequenceClassification.from_pretrained(saved).criterion is not None
    assert ee.EarlyExitForSequenceClassification.from_pretrained(folder).criterion is None


@pytest.mark.thorough
def test_users_of_locust(saved, tmp_path):
    if importlib.util.find_spec("locust") is None:  # its import changes the threads of the process that imports it
        pytest.skip("locust is not installed")
    with fake_server(saved) as url:
        found = users.record(OWN, 2, users.run(servers.Running(url, os.getpid()), ROWS, 2, 2, tmp_path))
    assert found["answers"] > 0 and found["failures"] == 0 and found["p99_ms"] > 0
    assert users.peak_memory(os.getpid()) > 10


def test_tables(monkeypatch):
    monkeypatch.setattr(tables, "measured", lambda suite: [])
    assert {table() for table in tables.TABLES.values()} == {tables.NOT_MEASURED}
    stats = {"Request Count": "10", "Failure Count": "1", "Requests/s": "4.5", "50%": "20", "99%": "30"}
    plain = arrivals.record(FULL, 2.0, 100.0, [10.0] * 9, refused=0)
    found = [arrivals.record(OWN, 2.0, 100.0, [5.0] * 9, refused=2), plain, users.record(OWN, 16, stats)]
    found.append({"part": "overhead", "server": LITSERVE, "p50_ms": 3.0, "p99_ms": 4.0, "overhead_ms": 1.25})
    monkeypatch.setattr(tables, "measured", lambda suite: [harness.Measured("m", {}, found)])
    arrived, overheads, loaded = (tables.TABLES[f"http_{name}"]() for name in ("arrivals", "overhead", "users"))
    assert "0.50" in arrived and "1.00" in arrived and len(arrived.splitlines()) == 4
    assert "1.25" in overheads and LITSERVE in overheads
    assert [cell.strip() for cell in loaded.splitlines()[2].split("|")][1:-1] == ["16", OWN, "4", "20", "30", "1"]
