"""How the loop learns how many rows are left: at once on the CPU, some layers late on CUDA.

Asking a GPU stops the host until all that is queued has run, and then the GPU waits for the host. But rows only leave:
what an exit counted some layers ago is an upper bound of what is there now, and the loop needs no more than a bound.
So on CUDA each exit's counts are sent to host memory, where the host looks when it passes by.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

#: How many layers the host runs ahead of the counts it knows: with one, the GPU has a layer to run while the host
#: launches the next, and a large batch carries the rows that have left for no more than a layer.
LAG = 1
#: Looks in vain after which other threads get the interpreter, and after which the GPU is asked whether it still works:
#: seldom, since that would break the capture of a graph in another thread.
LOOKS, LOOKS_AT_DEVICE = 2**8, 2**16
NUMBER_BITS = 32
LAST_EPOCH = 2**31 - 1


class Counts(Protocol):
    """What the loop knows of one batch.

    Attributes:
        invalid: for each layer 1..L, how many rows present had logits without a meaning, as far as is known.
    """

    invalid: list[int]

    def after(self, layer: int, counts: Tensor | None, bounds: tuple[int, int]) -> tuple[int, int]:
        """How many rows, and tokens of theirs, are live after 1-based `layer` at most.

        Args:
            layer: the one just run.
            counts: ``[3]`` int32 as `ops.exit_step` returns them, or None where the layer has no exit.
            bounds: what was known before.
        """

    def finish(self) -> Sequence[int]:
        """The whole of `invalid`, when the batch is through."""


class HostCounts:
    """Counts read at once: for the CPU, where that is free, and for a loop that has to know.

    Args:
        depth: L.
    """

    def __init__(self, depth: int) -> None:
        self.invalid = [0] * depth

    def after(self, layer: int, counts: Tensor | None, bounds: tuple[int, int]) -> tuple[int, int]:
        """As in `Counts`, exact."""
        if counts is None:
            return bounds
        live, tokens, self.invalid[layer - 1] = counts.tolist()
        return live, tokens

    def finish(self) -> list[int]:
        """As in `Counts`."""
        return self.invalid


#: Host memory that no batch uses now, by kind of device and depth.
_IDLE: dict[tuple[str, int], list[Tensor]] = {}
_EPOCHS = itertools.count()


class LaggedCounts:
    """Counts that arrive in pinned host memory when the device gets there; the host polls, and synchronises nowhere.

    Each number is one word ``epoch << 32 | number``. Eight aligned bytes arrive whole, and each layer has its own, so
    no look finds parts of two layers. The memory serves one batch after the other, and what the last one left there
    would be too small a bound: its words carry another epoch. `torch.compile` is kept out: it takes memory that changes
    by itself for a constant.

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
        """As in `Counts`; waits until the exits up to `lag` layers ago are known."""
        if counts is not None:
            self._send(layer, counts + self._tag)
            self._unknown.append(layer)
        while self._unknown and (self._unknown[0] <= layer - self.lag or self._seen(self._unknown[0])):
            bounds = self._take(self._unknown.popleft())
        return bounds

    @torch.compiler.disable
    def finish(self) -> list[int]:
        """As in `Counts`; waits for the last exit. Nothing is on its way to the memory then, so others may have it."""
        while self._unknown:
            self._take(self._unknown.popleft())
        self._idle.append(self._words)
        return self.invalid

    def _send(self, layer: int, words: Tensor) -> None:
        self._words[layer - 1].copy_(words, non_blocking=True)

    def _seen(self, layer: int) -> list[int] | None:
        """The numbers of a layer, if they have arrived."""
        words = self._memory[layer - 1].tolist()
        if any(word >> NUMBER_BITS != self._epoch for word in words):
            return None
        return [word & (1 << NUMBER_BITS) - 1 for word in words]

    def _take(self, layer: int) -> tuple[int, int]:
        """Wait for the numbers of a layer, keep the last, return the others."""
        looks = 0
        while (numbers := self._seen(layer)) is None:
            looks += 1
            if looks % LOOKS == 0:
                time.sleep(0)
            if looks % LOOKS_AT_DEVICE == 0 and self._stream is not None:
                self._stream.query()  # doesn't wait, and raises what has gone wrong
        live, tokens, self.invalid[layer - 1] = numbers
        return live, tokens


def _words(idle: list[Tensor], depth: int, device: torch.device) -> Tensor:
    """Memory for a batch's words ``[L, 3]`` int64: one that lies idle, or a new one."""
    try:
        return idle.pop()
    except IndexError:
        # a tensor of inference mode couldn't be written to by a batch outside of it
        with torch.inference_mode(False):
            return torch.zeros(depth, 3, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")


@torch.compiler.disable
def counts_for(depth: int, device: torch.device, *, exact: bool) -> Counts:
    """What suits a device.

    Args:
        depth: L.
        device: of the batch.
        exact: the loop can't do with bounds.
    """
    return HostCounts(depth) if exact or device.type != "cuda" else LaggedCounts(depth, device)
