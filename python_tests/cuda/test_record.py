"""Captures, with a replacement for the calls of torch.cuda: streams and pools after a success and a failure."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from earlyexit_kernels.cuda.record import Recorder

DEVICE = torch.device("cpu")


class Stream:
    """A stream that notes what it waits for."""

    def __init__(self, *_) -> None:
        self.waited = []

    def wait_stream(self, other) -> None:
        self.waited.append(other)


@pytest.fixture
def cuda(monkeypatch):
    """``torch.cuda`` with streams that are names, and captures that run at once; a failed one leaves its stream set."""
    fake = SimpleNamespace(current=Stream(), pools=[], graphs=[])

    @contextlib.contextmanager
    def graph(made, *, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        fake.pools.append(pool)
        before, fake.current = fake.current, stream
        yield
        fake.current = before

    @contextlib.contextmanager
    def stream_of(stream):
        before, fake.current = fake.current, stream
        yield
        fake.current = before

    def new_graph():
        fake.graphs.append(SimpleNamespace(replay=lambda: None))
        return fake.graphs[-1]

    for name, value in {
        "Stream": Stream,
        "graph": graph,
        "stream": stream_of,
        "CUDAGraph": new_graph,
        "graph_pool_handle": object,
        "device": lambda device: contextlib.nullcontext(),
        "current_stream": lambda *_: fake.current,
        "set_stream": lambda stream: setattr(fake, "current", stream),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return fake


def test_calls_run_before_they_are_captured_in_one_pool_that_stays(cuda):
    recorder, ran, outside = Recorder(DEVICE), [], cuda.current
    for _ in range(2):
        made, _ = recorder.record(lambda: ran.append(cuda.current) or len(ran))
    assert made == 4 and len(set(map(id, ran))) == 1 and ran[0] is not outside
    assert len(set(map(id, cuda.pools))) == 1 and len(cuda.graphs) == 3, "one graph keeps the pool"
    assert cuda.current is outside and outside.waited == ran[::2], "what runs next sees what the call has written"
    assert ran[0].waited == [outside] * 2, "the call sees what ran before it"


def test_a_failed_capture_sets_the_stream_back_and_takes_another_pool(cuda):
    recorder, outside, calls = Recorder(DEVICE), cuda.current, []

    def fails():
        calls.append(cuda.current)
        if len(calls) == 2:  # the capture
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        recorder.record(fails)
    assert cuda.current is outside
    recorder.record(lambda: None)
    assert len(set(map(id, cuda.pools))) == 2 and cuda.current is outside
