"""Replacements for captures of CUDA graphs, with which `engine.capturing` runs on the CPU.

Launches run during the capture, also those of a body whose condition is false: the kernels do nothing then. A replay
does nothing.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from earlyexit_kernels.engine import capturing
from earlyexit_kernels.engine.resident import ResidentLoop
from earlyexit_kernels.engine.resident_buffers import Bucket
from earlyexit_kernels.engine.view import ModelView


class Cuda:
    """Streams, and graphs of torch and of the extension.

    Attributes:
        said: the calls of graphs.
        conditions: those of torch's IF nodes, as they were when torch would read them.
        errors: call -> the error that it raises.
        current: the current stream.
        Graph: stands for `torch.cuda.CUDAGraph`.
    """

    def __init__(self) -> None:
        self.said: list[str] = []
        self.conditions: list[bool] = []
        self.errors: dict[str, BaseException] = {}
        self.default = self.current = self.new_stream("default")
        self.Graph = type("Graph", (_Graph,), {"cuda": self})

    def new_stream(self, name: Any = "") -> SimpleNamespace:
        done = SimpleNamespace(synchronize=lambda: None)
        return SimpleNamespace(
            name=str(name), wait_stream=lambda other: None, synchronize=lambda: None, record_event=lambda: done
        )

    @contextlib.contextmanager
    def stream(self, stream: Any):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def set_stream(self, stream: Any) -> None:
        self.current = stream

    def say(self, call: str) -> None:
        self.said.append(call)
        if call in self.errors:
            raise self.errors[call]

    def extension_graph(self) -> SimpleNamespace:
        """Return what stands for the extension's ConditionalGraph."""
        calls = ("begin", "begin_if", "end_if", "end", "abandon", "replay")
        graph = SimpleNamespace(**{call: lambda *given, call=call: self.say(call) for call in calls})
        graph.handle = lambda: self.say("handle") or len(self.said)
        return graph


class _Graph:
    """`torch.cuda.CUDAGraph`: a body is captured on a new stream, and the graph ends on the stream it began on."""

    cuda: Cuda

    def capture_begin(self, *pool: Any, capture_error_mode: str, **_: Any) -> None:
        assert self.cuda.current is not self.cuda.default and capture_error_mode == "thread_local"
        self.streams = [self.cuda.current]
        self.cuda.say("begin")

    def begin_capture_to_if_node(self, condition: torch.Tensor) -> None:
        assert condition.dtype == torch.bool and condition.shape == () and condition.is_contiguous()
        self.cuda.say("begin_if")
        self.cuda.conditions.append(bool(condition))
        self.streams.append(self.cuda.new_stream("body"))
        self.cuda.current = self.streams[-1]

    def end_capture_to_conditional_node(self) -> None:
        assert self.cuda.current is self.streams[-1] and len(self.streams) > 1
        self.cuda.say("end_if")  # an error leaves the stream of the body current
        self.streams.pop()
        self.cuda.current = self.streams[-1]

    def capture_end(self) -> None:
        self.cuda.said.append("end")
        if self.cuda.current is not self.streams[0]:
            raise RuntimeError("Capture must end on the same stream it began on.")
        if "end" in self.cuda.errors:
            raise self.cuda.errors["end"]

    def replay(self) -> None:
        self.cuda.said.append("replay")


@pytest.fixture
def cuda_captures(monkeypatch) -> Cuda:
    """Replace streams and graphs, and the back-ends of loops by torch."""
    cuda = Cuda()
    stand_ins = {
        "CUDAGraph": cuda.Graph,
        "Stream": cuda.new_stream,
        "stream": cuda.stream,
        "set_stream": cuda.set_stream,
        "current_stream": lambda device=None: cuda.current,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "current_device": lambda: 0,
        "graph_pool_handle": lambda: (0, 1),
        "is_current_stream_capturing": lambda: False,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    classes = SimpleNamespace(earlyexit_kernels=SimpleNamespace(ConditionalGraph=cuda.extension_graph))
    monkeypatch.setattr(torch, "classes", classes)
    monkeypatch.setattr(capturing, "ResidentLoop", _LoopOfTorch)
    return cuda


class _LoopOfTorch(ResidentLoop):
    """A loop on the back-end torch; its exits take the handles of the extension, and ignore them."""

    def __init__(self, view: ModelView, bucket: Bucket, *_: str) -> None:
        super().__init__(view, bucket, "torch", "torch")

    def _leave(self, layer: int, handle: int | None) -> None:
        super()._leave(layer, None)
