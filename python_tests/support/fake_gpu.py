"""Replacements for `torch.cuda`, with which the benchmarks of a GPU run on the CPU."""

from __future__ import annotations

import time
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BertConfig

from benchmarks import machine
from benchmarks.end_to_end import answers, measure, models
from benchmarks.end_to_end.workloads import Fixed
from benchmarks.gpu.bench import Bench

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


class Event:
    """An event that records the time of the host."""

    def __init__(self, **_: Any) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        return 1000 * (end.at - self.at)


def small_bench() -> Bench:
    """Return a `Bench` with the usual numbers of rows and the smallest other sizes."""
    return Bench("cpu", "torch", length=8, width=24, copies=2, rounds=2, warmup=3, mixed=6)


def use_tiny_models(monkeypatch) -> None:
    """Replace the models of the benchmarks by tiny ones of the same names, and remove pauses between measurements."""
    config = BertConfig(num_labels=models.CLASSES, vocab_size=100, **SIZES)
    subjects = {name: partial(models.random_subject, name, config) for name in models.SUBJECTS}
    monkeypatch.setattr(models, "SUBJECTS", subjects)
    monkeypatch.setattr(measure, "REST", 0)
    monkeypatch.setitem(answers.PROBES, "cpu", Fixed(4, 8))
    clear_caches()


def clear_caches() -> None:
    """Drop all models that the benchmarks keep."""
    for cache in (models.subject, models.engine_model, answers.rounding_of, machine.l2_filler):
        cache.cache_clear()


@pytest.fixture
def gpu(monkeypatch, replays) -> Bench:
    """Replace everything that the benchmarks use of CUDA, and return a small bench."""
    card = SimpleNamespace(name="Fake GPU", L2_cache_size=64, multi_processor_count=2, total_memory=2**30)
    for name, stand_in in {
        "synchronize": lambda: None,
        "Event": Event,
        "get_device_properties": lambda *_: card,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: card.name,
        "set_sync_debug_mode": lambda mode: None,
        "_sleep": lambda cycles: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(models, "runs_natively", lambda dtype: True)
    use_tiny_models(monkeypatch)
    yield small_bench()
    clear_caches()
