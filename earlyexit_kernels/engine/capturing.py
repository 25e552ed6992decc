"""Capture of the resident loop in a CUDA graph: with IF nodes of the extension, with IF nodes of torch, or without.

An IF node skips a group of layers if no row is live. Without nodes all kernels run, and return at once if no row is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from earlyexit_kernels.backends import NAMESPACE
from earlyexit_kernels.engine.choice import Choice
from earlyexit_kernels.engine.fingerprint import ModuleFingerprint
from earlyexit_kernels.engine.locks import ForkSafeLock
from earlyexit_kernels.engine.resident import Nodes, ResidentLoop
from earlyexit_kernels.engine.resident_buffers import Arena, Bucket
from earlyexit_kernels.engine.resident_exits import runs_modules
from earlyexit_kernels.engine.view import ModelView
from earlyexit_kernels.ops.resident_exit import LIVE

logger = logging.getLogger("earlyexit_kernels")

WARM_UPS = 2
#: Methods of `torch.cuda.CUDAGraph` that begin and end the body of an IF node; torch 2.13 has them, 2.11 does not.
TORCH_CALLS = ("begin_capture_to_if_node", "end_capture_to_conditional_node")
#: Graphs of torch that are kept after a body could not be ended; see `TorchNodes`.
_BROKEN: list[Any] = []


@dataclass(frozen=True)
class Captured:
    """One captured graph.

    Attributes:
        loop: its buffers.
        replay: launches it.
        made_from: the modules whose weights it reads by address. Weights are not copied, so a weight that changes in
            place needs no new capture.
        results: pinned copy of the loop's counts ``[L + 1, 6]``.
    """

    loop: ResidentLoop
    replay: Callable[[], None]
    made_from: ModuleFingerprint
    results: Tensor


def available_nodes(backend: str) -> Choice:
    """Return whose IF nodes a graph can have, ``"extension"``, ``"torch"`` or ``"none"``, and why.

    Args:
        backend: of the exits.
    """
    if backend == "cpp":
        return Choice("extension", "the exits run on back-end 'cpp', which sets their conditions")
    missing = [call for call in TORCH_CALLS if not hasattr(torch.cuda.CUDAGraph, call)]
    if missing:
        return Choice("none", f"torch {torch.__version__} has no CUDAGraph.{missing[0]}")
    return Choice("torch", f"the exits run on back-end {backend!r}, and torch reads the conditions from their counts")


def nodes_for(view: ModelView, backend: str) -> Choice:
    """Return whose IF nodes a graph of a model gets, and why; see `available_nodes`."""
    found = available_nodes(backend)
    if found.name == "torch" and runs_modules(view):
        # a library keeps its workspace by stream; torch has a stream for each body, at an address that other graphs
        # reuse, so graphs that run at the same time would share a workspace
        return Choice("none", "torch modules compute the exits, and would share workspaces with those of other graphs")
    return found


#: Held during a capture. Two at a time could share workspaces, and what one synchronises would end the other.
CAPTURES = ForkSafeLock()


@torch.inference_mode(False)
def capture(view: ModelView, bucket: Bucket, backend: str, stream: Any, arena: Arena | None = None) -> Captured:
    """Build the loop of a bucket and capture it.

    Args:
        view: of the model.
        bucket: the largest batch.
        backend: of the exits.
        stream: to warm up, capture and replay on; cuBLAS has one workspace per stream.
        arena: as for `ResidentLoop`.
    """
    made_from, nodes = ModuleFingerprint(view.roots), nodes_for(view, backend)
    with CAPTURES, torch.cuda.stream(stream):
        loop = ResidentLoop(view, bucket, "triton", backend, arena)
        for _ in range(WARM_UPS):
            loop.launch()
        stream.synchronize()
        replay = record(nodes.name, loop.launch, stream)
    logger.info("captured %s; IF nodes %r: %s", bucket, *nodes)
    on_gpu = loop.device.type == "cuda"
    results = torch.zeros(loop.counts.shape, dtype=loop.counts.dtype, device="cpu", pin_memory=on_gpu)
    return Captured(loop, replay, made_from, results)


def record(nodes: str, launch: Callable[[Nodes | None], None], stream: Any) -> Callable[[], None]:
    """Capture launches, and return what replays them.

    Args:
        nodes: name from `available_nodes`.
        launch: called once with the nodes, or None.
        stream: the current stream.
    """
    return _RECORD[nodes](launch, stream)


class ConditionalNodes:
    """IF nodes of a graph that the compiled extension captures (csrc/cuda/graph.cpp); see `resident.Nodes`.

    Args:
        graph: being captured.
    """

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self.handle = graph.handle

    def when(self, handle: int, counts: Tensor, body: Callable[[], None]) -> None:
        """Add an IF node."""
        self.graph.begin_if(handle)
        body()
        self.graph.end_if()


class TorchNodes:
    """IF nodes of a graph that torch captures; see `resident.Nodes`.

    Before each node torch launches a kernel that reads the condition, a bool. It captures the body on a new stream,
    which is the current one until the end of the body.

    Args:
        graph: being captured.
    """

    def __init__(self, graph: Any) -> None:
        self.graph = graph

    def handle(self) -> None:
        """Return None: exits have nothing to set."""

    def when(self, handle: None, counts: Tensor, body: Callable[[], None]) -> None:
        """Add an IF node; it is ended also if `body` raises."""
        stream = torch.cuda.current_stream(counts.device)
        self.graph.begin_capture_to_if_node(counts[LIVE:].view(torch.bool)[0])
        try:
            body()
        finally:
            self._end(stream)

    def _end(self, stream: Any) -> None:
        try:
            self.graph.end_capture_to_conditional_node()
        except BaseException:
            # then torch may hold the guard of the body's stream until the graph is destroyed, at any time, in any
            # thread, whose current stream would change
            _BROKEN.append(self.graph)
            raise
        finally:
            torch.cuda.set_stream(stream)  # the only one on which the capture of the graph can end


def _by_torch(nodes: Callable[[Any], Nodes | None], launch: Callable, stream: Any) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        launch(nodes(graph))
    return graph.replay


def _by_extension(launch: Callable, stream: Any) -> Callable[[], None]:
    graph = getattr(torch.classes, NAMESPACE).ConditionalGraph()
    # as torch.cuda.graph does: the allocator cannot release cached memory during a capture
    torch.cuda.empty_cache()
    try:
        graph.begin(torch.cuda.current_device(), *torch.cuda.graph_pool_handle())
        launch(ConditionalNodes(graph))
        graph.end()
    except BaseException:
        # otherwise the stream would continue to capture
        graph.abandon()
        raise
    return graph.replay


_RECORD: dict[str, Callable[..., Callable[[], None]]] = {
    "extension": _by_extension,
    "torch": partial(_by_torch, TorchNodes),
    "none": partial(_by_torch, lambda graph: None),
}
