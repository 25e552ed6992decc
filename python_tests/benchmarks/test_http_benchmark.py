"""The benchmark of the HTTP server: its clients against a server of known answers, and its tables."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

pytest.importorskip("httpx")
pytest.importorskip("fastapi")
from support.servers import thread_server
from support.text_models import saved_model, texts

import earlyexit_kernels as ee
from benchmarks import harness, tables
from benchmarks.http import load, servers
from benchmarks.http.servers import FULL, LITSERVE, OWN
from earlyexit_kernels.serving.source import Source
from earlyexit_kernels.tuning.tables import environment

ROWS = texts(40)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("model"), ROWS)


def test_every_arrival_is_answered_and_timed(saved):
    with thread_server(Source.of(saved, None)) as url:
        latencies, asked = asyncio.run(load.session(url, ROWS, rate=200.0, seed=0, seconds=0.5))
        same, _ = asyncio.run(load.session(url, ROWS, rate=200.0, seed=0, seconds=0.5))
        assert asyncio.run(load.throughput(url, ROWS, 0.3)) > 0
    assert 50 < len(latencies) == asked == len(same) < 200 and min(latencies) > 0


def test_one_client_takes_turns_with_the_scorer(saved, tmp_path, monkeypatch):
    """Each server, here the same one, gets as many requests as the scorer gets texts."""
    monkeypatch.setattr(load, "REST", 0)
    with thread_server(Source.of(saved, None)) as url:
        monkeypatch.setattr(load, "serving", lambda *_: contextlib.nullcontext(url))
        records = list(load.overhead(saved, tmp_path, ROWS, 3))
    assert [record["server"] for record in records] == [load.ALONE, OWN, LITSERVE]
    assert records[0]["overhead_ms"] == 0 and all(record["p50_ms"] > 0 for record in records)


def test_copy_without_a_criterion(saved, tmp_path):
    folder = servers.full_depth_copy(saved, tmp_path)
    assert ee.EarlyExitForSequenceClassification.from_pretrained(saved).criterion is not None
    assert ee.EarlyExitForSequenceClassification.from_pretrained(folder).criterion is None


def test_tables(monkeypatch):
    arrivals, overheads = tables.TABLES["http_arrivals"], tables.TABLES["http_overhead"]
    monkeypatch.setattr(tables, "measured", lambda suite, results: [])
    assert arrivals() == overheads() == tables.NOT_MEASURED
    plain = load.record(FULL, 2.0, 100.0, [10.0] * 9, turned_away=0)
    found = [load.record(OWN, 2.0, 100.0, [5.0] * 9, turned_away=2), plain]
    found.append({"part": "overhead", "server": LITSERVE, "p50_ms": 3.0, "p99_ms": 4.0, "overhead_ms": 1.25})
    monkeypatch.setattr(tables, "measured", lambda suite, results: [harness.Measured("m", environment(), found)])
    assert "0.50" in arrivals() and "1.00" in arrivals() and len(arrivals().splitlines()) == 6
    assert "1.25" in overheads() and LITSERVE in overheads()
