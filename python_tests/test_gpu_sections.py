"""Every section of ``make gpu-check`` on the CPU, with a stand-in for the GPU: what it records, and what it refuses."""

from __future__ import annotations

import functools
import json
from collections import Counter

import pytest
from fake_gpu import captures, gpu  # noqa: F401  fixtures

from benchmarks.gpu import exits, goals, promises
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.sections import SECTIONS

FIELDS = {"suite", "case", "shape", "dtype", "engine", "backend", "baseline"}
NUMBERS = {"median_ms", "syncs", "different", "launches", "works", "entry"}


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    """Calls that no CPU makes."""

    def as_a_gpu_would(run):
        run()
        return Counter({"cudaGraphLaunch": 1, "cudaEventSynchronize": 1, "cudaGetDevice": 7})

    monkeypatch.setattr(promises, "calls_of", as_a_gpu_would)
    monkeypatch.setattr(exits, "calls_of", as_a_gpu_would)
    monkeypatch.setattr(exits, "LARGE_COPY", 2**12)
    monkeypatch.delenv("EARLYEXIT_DATA", raising=False)


def records_of(name: str, gpu: Bench) -> list[dict]:  # noqa: F811
    return list(SECTIONS[name].records(gpu))


@functools.cache
def _bars() -> set[str]:
    return set()


@pytest.mark.parametrize("name", SECTIONS)
def test_every_section_runs_and_records(name, gpu):  # noqa: F811
    records = records_of(name, gpu)
    assert records and {record["suite"] for record in records} == {f"gpu_{name}"}
    for record in json.loads(json.dumps(records)):
        assert set(record) >= FIELDS and NUMBERS & set(record), record
        assert ("bar" in record) <= (record.get("goal_met") in (True, False))
    _bars().update(record["bar"] for record in records if "bar" in record)


def test_every_line_of_the_bar_has_a_record():
    if len(_bars()) < 2:
        pytest.skip("runs after the sections, in their process")
    assert _bars() == set(goals.GOALS) - {"errors that compute-sanitizer finds"}
