"""The number of live rows, as the host knows it: at once on the CPU, some layers late on CUDA.

Reading from a GPU stalls the host until all queued work is done, and the GPU then waits for the host. But rows only
leave: the count of an earlier exit is an upper bound of the rows live now, and the loop needs no more than a bound. So
on CUDA each exit's counts are copied to pinned host memory, which the host polls.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

#: Number of layers that the host runs ahead of the counts it knows: with one, the GPU runs a layer while the host
#: launches the next one, and rows that have left stay in the batch for at most one layer.
LAG = 1
#: Failed polls before the thread yields the GIL, and before it checks the device for errors: rarely, since that check
#: would break the capture of a graph in another thread.
POLLS_PER_YIELD, POLLS_PER_DEVICE_CHECK = 2**8, 2**16
NUMBER_BITS = 32
LAST_EPOCH = 2**31 - 1


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


#: Unused host memory by kind of device and depth.
_IDLE: dict[tuple[str, int], list[Tensor]] = {}
_EPOCHS = itertools.count()


class LaggedCounts:
    """Counts that the device copies to pinned host memory, which the host polls without synchronisation.

    Each number is one word ``epoch << 32 | number``. Eight aligned bytes are copied atomically, and each layer has its
    own words, so no poll mixes two layers. The memory is reused by later batches; the epoch distinguishes the words of
    a batch from stale ones. `torch.compile` is disabled, because it would treat memory that changes by itself as
    constant.

    Args:
        depth: L.
        device: where the batch runs, on the current stream.
    """

    lag = LAG

    def __init__(self, depth: int, device: torch.device) -> None:
        self.invalid = [0] * depth
        self._epoch = next(_EPOCHS) % LAST_EPOCH + 1
        self._tag = torch.full((1,), self._epoch << NUMBER_BITS, dtype=torch.int64, device=device)
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._idle = _IDLE.setdefault((device.type, depth), [])
        self._words = _words(self._idle, depth, device)
        self._memory = self._words.numpy()
        self._unknown: deque[int] = deque()

    @torch.compiler.disable
    def after(self, layer: int, counts: Tensor | None, bounds: tuple[int, int]) -> tuple[int, int]:
        """Return the bounds, as in `Counts`; waits for the exits up to `lag` layers ago."""
        if counts is not None:
            self._send(layer, counts + self._tag)
            self._unknown.append(layer)
        while self._unknown and (self._unknown[0] <= layer - self.lag or self._arrived(self._unknown[0])):
            bounds = self._take(self._unknown.popleft())
        return bounds

    @torch.compiler.disable
    def finish(self) -> list[int]:
        """Return `invalid` after the last exit; the memory has no pending writes then and can be reused."""
        while self._unknown:
            self._take(self._unknown.popleft())
        self._idle.append(self._words)
        return self.invalid

    def _send(self, layer: int, words: Tensor) -> None:
        self._words[layer - 1].copy_(words, non_blocking=True)

    def _arrived(self, layer: int) -> list[int] | None:
        """Return the numbers of a layer, or None if they have not arrived."""
        words = self._memory[layer - 1].tolist()
        if any(word >> NUMBER_BITS != self._epoch for word in words):
            return None
        return [word & (1 << NUMBER_BITS) - 1 for word in words]

    def _take(self, layer: int) -> tuple[int, int]:
        """Wait for the numbers of a layer, store the third one and return the others."""
        polls = 0
        while (numbers := self._arrived(layer)) is None:
            polls += 1
            if polls % POLLS_PER_YIELD == 0:
                time.sleep(0)
            if polls % POLLS_PER_DEVICE_CHECK == 0 and self._stream is not None:
                self._stream.query()  # does not wait, and raises errors of the device
        live, tokens, self.invalid[layer - 1] = numbers
        return live, tokens


def _words(idle: list[Tensor], depth: int, device: torch.device) -> Tensor:
    """Return memory for the words of a batch, ``[L, 3]`` int64: idle memory, or new."""
    try:
        return idle.pop()
    except IndexError:
        # a batch outside of inference mode cannot write to a tensor made in it
        with torch.inference_mode(False):
            return torch.zeros(depth, 3, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")


@torch.compiler.disable
def counts_for(depth: int, device: torch.device, *, exact: bool) -> Counts:
    """Return the counts for a batch on a device.

    Args:
        depth: L.
        device: of the batch.
        exact: whether the loop needs exact counts.
    """
    return HostCounts(depth) if exact or device.type != "cuda" else LaggedCounts(depth, device)
