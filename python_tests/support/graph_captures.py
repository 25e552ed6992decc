"""Replaces captures of the graph engine by plain runs of the loop, so that no GPU is needed."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from earlyexit_kernels.engine import graphs
from earlyexit_kernels.engine.capturing import Captured
from earlyexit_kernels.engine.fingerprint import ModuleFingerprint
from earlyexit_kernels.engine.resident import ResidentLoop
from earlyexit_kernels.engine.resident_buffers import Bucket


@pytest.fixture
def captures(monkeypatch):
    """Replace streams by ones without effect, and captures by runs of the loop; return the captured buckets."""
    stream = SimpleNamespace(
        wait_stream=lambda other: None, record_event=lambda: SimpleNamespace(synchronize=lambda: None)
    )
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    made: list[Bucket] = []

    def plain(parts, bucket, backend, stream, arena=None):
        made.append(bucket)
        loop = ResidentLoop(parts, bucket, "torch", "torch", arena)
        with torch.inference_mode(False):
            results = torch.zeros(loop.counts.shape, dtype=loop.counts.dtype)
        return Captured(loop, loop.launch, ModuleFingerprint(parts.roots), results)

    monkeypatch.setattr(graphs, "capture", plain)
    return made
