"""Capture of torch calls in CUDA graphs that share their memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from earlyexit_kernels.core.locks import ForkSafeLock

Made = TypeVar("Made")

#: Held during a capture. Two at a time could share workspaces, and what one synchronises would end the other.
CAPTURES = ForkSafeLock()


class Recorder:
    """Captures calls on one device, on a stream of its own, in one pool of memory.

    Tensors that a call makes and drops share memory with those of other calls, so that only one replay may run at a
    time. What a call returns keeps its memory.

    Args:
        device: of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._renew()

    def _renew(self) -> None:
        """Take another stream and pool; those of a capture that failed may be left in the middle of it."""
        self._stream, self._pool = torch.cuda.Stream(self._device), torch.cuda.graph_pool_handle()
        #: Keeps the pool when all other graphs in it are gone, while workspaces in it are not.
        self._anchor: Any = None

    def record(self, run: Callable[[], Made]) -> tuple[Made, Callable[[], None]]:
        """Run a call once, which makes what is made lazily, and capture it.

        Returns:
            What the call returned, whose tensors get their values at a replay, and the function that replays it.
        """
        with CAPTURES, torch.cuda.device(self._device):
            before = torch.cuda.current_stream()
            self._stream.wait_stream(before)
            try:
                if self._anchor is None:
                    self._anchor = self._captured(torch.zeros(1, device=self._device).zero_)[1]
                with torch.cuda.stream(self._stream):
                    run()
                made, graph = self._captured(run)
            except BaseException:
                torch.cuda.set_stream(before)
                self._renew()
                raise
            before.wait_stream(self._stream)
        return made, graph.replay

    def _captured(self, run: Callable[[], Made]) -> tuple[Made, Any]:
        graph: Any = torch.cuda.CUDAGraph()
        # other threads may use CUDA meanwhile
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            made = run()
        return made, graph
