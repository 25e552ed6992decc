"""A driver of `make gpu-check` with its own clock and given steps."""

from __future__ import annotations

import pytest
import torch

from benchmarks import harness
from benchmarks.gpu import card, check
from benchmarks.gpu.bench import header
from benchmarks.gpu.check import Step
from benchmarks.gpu.steps import Outcome


class Clock:
    """A clock in seconds that only tests advance."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """``driver(outcomes, ...)``: run steps with given outcomes, with results in a temporary folder."""
    monkeypatch.setattr(card, "facts", lambda: {"gpu": "Fake", "nvidia_smi": {"driver_version": "580.1"}})
    monkeypatch.setattr(card, "fingerprint", lambda: driver.sources)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Fake")
    clock, driver_ran = Clock(), []

    def driver(outcomes, *, takes=10.0, minutes=9.0, redo=False, always=(), least=30):
        def step(name, outcome):
            def run(seconds):
                driver_ran.append((name, seconds))
                clock.now += takes
                return outcome() if callable(outcome) else outcome

            return Step(run, 100, name in always, least)

        driver_ran.clear()
        wanted = {name: step(name, outcome) for name, outcome in outcomes.items()}
        return check.check(wanted, minutes=minutes, redo=redo, results=tmp_path, now=clock)

    driver.sources, driver.ran, driver.results = "aaaa", driver_ran, tmp_path
    return driver


def good(name, **fields) -> Outcome:
    return Outcome([header(f"gpu_{name}", name, "ours") | {"median_ms": 1.0} | fields])


def document(driver) -> dict:
    (found,) = harness.documents(driver.results).values()
    return found
