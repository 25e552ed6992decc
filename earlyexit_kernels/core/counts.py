"""The number of live rows, as the host knows it: at once on the CPU, some layers late on CUDA.

Reading from a GPU stalls the host until all queued work is done, and the GPU then waits for the host. But rows only
leave: the count of an earlier exit is an upper bound of the rows live now, and the loop needs no more than a bound. So
on CUDA each exit's counts are copied to pinned host memory, and an event tells when they have arrived.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

#: Number of layers that the host runs ahead of the counts it knows: with one, the GPU runs a layer while the host
#: launches the next one, and rows that have left stay in the batch for at most one layer.
LAG = 1


class Counts(Protocol):
    """The counts of one batch.

    Attributes:
        invalid: for each layer 1..L the number of present rows with invalid logits, as far as it is known.
    """

    invalid: list[int]

    def after(self, layer: int, counts: Tensor | None, bounds: tuple[int, int]) -> tuple[int, int]:
        """Return upper bounds of the live rows and their tokens after 1-based `layer`.

        Args:
            layer: the layer just run.
            counts: ``[3]`` int32 from `ops.exit_step`, or None if the exit was not computed.
            bounds: the previous bounds.
        """

    def finish(self) -> Sequence[int]:
        """Return the complete `invalid` at the end of the batch."""


class HostCounts:
    """Counts read at once: for the CPU, where that is free, and for loops that need exact counts.

    Args:
        depth: L.
    """

    def __init__(self, depth: int) -> None:
        self.invalid = [0] * depth

    def after(self, layer: int, counts: Tensor | None, bounds: tuple[int, int]) -> tuple[int, int]:
        """Return the exact numbers, as in `Counts`."""
        if counts is None:
            return bounds
        live, tokens, self.invalid[layer - 1] = counts.tolist()
        return live, tokens

    def finish(self) -> list[int]:
        """Return `invalid`."""
        return self.invalid


class Arrival(Protocol):
    """Tells when the work before it is done, as `torch.cuda.Event`."""

    def query(self) -> bool:
        """Return whether it is done."""

    def synchronize(self) -> None:
        """Wait until it is done, and raise the errors of the device."""


class Sent(NamedTuple):
    """Counts ``[3]`` on their way to the host, after a layer."""

    layer: int
    counts: Tensor
    arrival: Arrival


class LaggedCounts:
    """Counts that the device copies to pinned host memory while the host goes on.

    The memory comes from torch's allocator, which does not reuse it before the copies are done. `torch.compile` is
    disabled, because it would treat memory that changes by itself as constant.

    Args:
        depth: L.
        device: where the batch runs, on the current stream.
    """

    lag = LAG

    def __init__(self, depth: int, device: torch.device) -> None:
        self.invalid = [0] * depth
        self._device = device
        self._memory = torch.empty(depth, 3, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")
        self._sent: deque[Sent] = deque()

    @torch.compiler.disable
    def after(self, layer: int, counts: Tensor | None, bounds: tuple[int, int]) -> tuple[int, int]:
        """Return the bounds, as in `Counts`; waits for the exits up to `lag` layers ago."""
        if counts is not None:
            self._sent.append(Sent(layer, *self._send(counts, self._memory[layer - 1])))
        while self._sent and (self._sent[0].layer <= layer - self.lag or self._sent[0].arrival.query()):
            bounds = self._take(self._sent.popleft())
        return bounds

    @torch.compiler.disable
    def finish(self) -> list[int]:
        """Return `invalid` after the last exit."""
        while self._sent:
            self._take(self._sent.popleft())
        return self.invalid

    def _send(self, counts: Tensor, memory: Tensor) -> tuple[Tensor, Arrival]:
        memory.copy_(counts, non_blocking=True)
        arrival = torch.cuda.Event()
        arrival.record(torch.cuda.current_stream(self._device))
        return memory, arrival

    def _take(self, sent: Sent) -> tuple[int, int]:
        """Wait for the counts of a layer, store the third one and return the others."""
        sent.arrival.synchronize()
        live, tokens, self.invalid[sent.layer - 1] = sent.counts.tolist()
        return live, tokens


def counts_for(depth: int, device: torch.device, *, exact: bool) -> Counts:
    """Return the counts for a batch on a device.

    Args:
        depth: L.
        device: of the batch.
        exact: whether the loop needs exact counts.
    """
    return HostCounts(depth) if exact or device.type != "cuda" else _lagged(depth, device)


@torch.compiler.disable
def _lagged(depth: int, device: torch.device) -> LaggedCounts:
    return LaggedCounts(depth, device)
