"""The graph engine: the resident loop of a bucket captured once, and replayed with one launch and one synchronisation.

Each group of layers lies behind an IF node on the live count where the compiled extension has them
(csrc/cuda/graph.cpp), and the groups of an ALBERT, which are one, in a single WHILE node; without it the graph is a
plain one, whose kernels return at once when nothing is left to do.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from earlyexit_kernels.backends import NAMESPACE, available_backends
from earlyexit_kernels.engine.fingerprint import ModuleFingerprint
from earlyexit_kernels.engine.packing import refuse_masked_first
from earlyexit_kernels.engine.resident import Bucket, Parts, ResidentLoop, why_not_resident
from earlyexit_kernels.ops import MOST_ROWS
from earlyexit_kernels.types import ExitOutput

#: Graphs kept for one model; the one that wasn't used for longest goes.
MOST_GRAPHS = 16
#: Tokens that the buffers of a bucket hold at most; a larger batch is split.
MOST_TOKENS = 65_536
SHORTEST = 16
WARM_UPS = 2


class CaptureError(RuntimeError):
    """A graph can't be had for a batch; the message says why."""


def bucket_of(rows: int, length: int) -> Bucket:
    """The smallest bucket that holds a batch: powers of two, so that few graphs serve all batches."""
    return Bucket(1 << (rows - 1).bit_length(), max(SHORTEST, 1 << (length - 1).bit_length()))


def most_rows(length: int) -> int:
    """How many rows of a length one graph takes."""
    return max(1, min(MOST_ROWS, MOST_TOKENS // bucket_of(1, length).length))


class Key(NamedTuple):
    """What a graph is captured for; a model may move to another device, and come back."""

    bucket: Bucket
    backend: str
    criterion: Any
    dtype: torch.dtype
    device: torch.device


def key_of(parts: Parts, backend: str, rows: int, length: int) -> Key:
    """That of a batch ``[N, S]`` of one graph at most."""
    weight = next(parts.backbone.parameters())
    return Key(bucket_of(rows, length), backend, parts.criterion, weight.dtype, weight.device)


@dataclass(frozen=True)
class Captured:
    """One graph.

    Attributes:
        loop: its buffers.
        replay: launch it.
        made_from: the modules it was captured on, whose addresses it holds. It copies no weight, so that a weight
            changed in place needs no new capture.
        results: pinned copy of the loop's counts ``[L + 1, 4]``.
    """

    loop: ResidentLoop
    replay: Callable[[], None]
    made_from: ModuleFingerprint
    results: Tensor


class Graphs:
    """The graphs of one model, captured when first asked for, and again when its modules or weights are replaced.

    A graph holds no copy of a weight: weights that change in place are read as they are at each replay.

    One batch at a time: threads take turns, on a stream of its own, so that several streams are served too. Copies and
    pickles of the model start without.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._captured: collections.OrderedDict[Key, Captured] = collections.OrderedDict()
        self._refused: dict[Key, str] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def __deepcopy__(self, memo: Any) -> Graphs:
        return Graphs()

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphs, ()

    def forget(self) -> None:
        """Drop all graphs."""
        with self._lock:
            self._captured.clear()
            self._refused.clear()

    def why_not(self, parts: Parts, backend: str, rows: int, length: int, *, checked: bool = True) -> str:
        """Empty where `run` can answer a batch, as far as is known, else what stands against it. Changes nothing.

        Args:
            parts, backend: as for `run`.
            rows, length: N and S.
            checked: look at the model even where it has a graph, which may be stale. A loop over batches leaves it to
                `run`, which looks while the device works.
        """
        most = most_rows(length)
        for key in {key_of(parts, backend, part, length) for part in (min(rows, most), rows % most or most)}:
            captured = self._captured.get(key)
            current = captured is not None and (not checked or captured.made_from.is_current(parts.roots))
            if not current and (reason := self._why_not(key, parts)):
                return reason
        return ""

    def run(
        self,
        parts: Parts,
        backend: str,
        ids: Tensor,
        mask: Tensor | None,
        types: Tensor | None,
        positions: Tensor | None,
    ) -> ExitOutput:
        """Answer a batch of any size.

        Args:
            parts: of the model, of which `why_not_resident` has nothing to say.
            backend: of the exits; the encoder's kernels are Triton's.
            ids, mask, types, positions: ``[N, S]`` on the model's device, N at least 1.

        Raises:
            CaptureError: no graph can be had.
        """
        if torch.cuda.is_current_stream_capturing():
            raise CaptureError("the current stream is capturing; capture model.fixed_depth() instead")
        size = most_rows(ids.shape[1])
        parted = [None if x is None or x.shape[0] == 1 else x.split(size) for x in (mask, types, positions)]
        with self._lock:
            outputs = [
                self._part(
                    parts,
                    backend,
                    chunk,
                    *(
                        x if split is None else split[number]
                        for x, split in zip((mask, types, positions), parted, strict=True)
                    ),
                )
                for number, chunk in enumerate(ids.split(size))
            ]
        return outputs[0] if len(outputs) == 1 else ExitOutput.cat(outputs)

    def _part(self, parts: Parts, backend: str, ids: Tensor, *others: Tensor | None) -> ExitOutput:
        n, key = ids.shape[0], key_of(parts, backend, *ids.shape)
        if key.device not in self._streams:
            self._streams[key.device] = torch.cuda.Stream(key.device)
        stream, current = self._streams[key.device], torch.cuda.current_stream(key.device)
        while True:
            # before a capture too, which reads weights
            stream.wait_stream(current)
            captured = self._of(key, parts, stream)
            with torch.cuda.stream(stream):
                captured.loop.load(ids, *others)
                captured.replay()
                answers, exit_layer = captured.loop.answers[:n].clone(), captured.loop.exit_layer[:n].clone()
                captured.results.copy_(captured.loop.counts, non_blocking=True)
                done = stream.record_event()
            # checked while the device works; the answers of a stale graph are dropped
            if captured.made_from.is_current(parts.roots):
                break
            del captured
            self._drop_stale(parts)
        current.wait_stream(stream)
        for x in (answers, exit_layer):
            x.record_stream(current)
        done.synchronize()
        masked_first, *invalid = captured.results[:, 2].tolist()
        if captured.loop.pools_first:
            refuse_masked_first(masked_first > 0)
        return ExitOutput(answers, exit_layer, exit_layer.clone(), tuple(invalid))

    def _why_not(self, key: Key, parts: Parts) -> str:
        if key in self._refused:
            return self._refused[key]
        reason = why_not_resident(parts, key.dtype)
        return f"a graph can't hold this model: {reason}" if reason else ""

    def _drop_stale(self, parts: Parts) -> None:
        stale = [key for key, captured in self._captured.items() if not captured.made_from.is_current(parts.roots)]
        for key in stale:
            del self._captured[key]

    def _of(self, key: Key, parts: Parts, stream: Any) -> Captured:
        if key not in self._captured:
            if reason := self._why_not(key, parts):
                raise CaptureError(reason)
            self._drop_stale(parts)
            try:
                self._captured[key] = self._capture(key, parts, stream)
            except Exception as error:  # Triton's own are no RuntimeErrors
                said = str(error).partition("\n")[0] or type(error).__name__
                self._refused[key] = f"capturing {key.bucket} failed: {said}"
                raise CaptureError(self._refused[key]) from error
            while len(self._captured) > MOST_GRAPHS:
                self._captured.popitem(last=False)
        self._captured.move_to_end(key)
        return self._captured[key]

    def _capture(self, key: Key, parts: Parts, stream: Any) -> Captured:
        try:
            return capture(parts, key.bucket, key.backend, stream)
        except torch.OutOfMemoryError:
            if not self._captured:
                raise
            # the others have the memory, and can be captured again
            self._captured.clear()
            return capture(parts, key.bucket, key.backend, stream)


@torch.inference_mode(False)
def capture(parts: Parts, bucket: Bucket, backend: str, stream: Any) -> Captured:
    """Build a bucket's loop and capture it.

    Args:
        parts: of the model.
        bucket: the largest batch.
        backend: of the exits.
        stream: to warm up, capture and replay on; cuBLAS keeps its workspace by stream.
    """
    made_from = ModuleFingerprint(parts.roots)
    with torch.cuda.stream(stream):
        loop = ResidentLoop(parts, bucket, "triton", backend)
        for _ in range(WARM_UPS):
            loop.launch()
        stream.synchronize()
        replay = _conditional(loop) if backend == "cpp" else _plain(loop, stream)
    results = torch.zeros(loop.counts.shape, dtype=loop.counts.dtype, device="cpu", pin_memory=True)
    return Captured(loop, replay, made_from, results)


def _plain(loop: ResidentLoop, stream: Any) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        loop.launch()
    return graph.replay


class ConditionalNodes:
    """The nodes of a graph that the compiled extension captures; see `resident.Nodes`.

    Args:
        graph: between begin and end.
    """

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self.handle, self.repeats = graph.handle, graph.has_switch()

    def when(self, handle: int, body: Callable[[], None]) -> None:
        """An IF node."""
        self.graph.begin_if(handle)
        body()
        self.graph.end_if()

    def repeat(self, handle: int, body: Callable[[], None]) -> None:
        """A WHILE node."""
        self.graph.begin_while(handle)
        body()
        self.graph.end_while()

    def take_turns(self, turn: Tensor, again: int, bodies: Sequence[Callable[[], None]]) -> None:
        """A SWITCH node."""
        chosen = self.graph.handle()
        self.graph.take_turn(turn, chosen, again, len(bodies))
        self.graph.begin_switch(chosen, len(bodies))
        for number, body in enumerate(bodies):
            if number:
                self.graph.next_case()
            body()
        self.graph.end_switch()


def _conditional(loop: ResidentLoop) -> Callable[[], None]:
    """Capture on the current stream, with nodes for what may not have to run."""
    graph = getattr(torch.classes, NAMESPACE).ConditionalGraph()
    # as torch.cuda.graph does: what the allocator keeps for others it can't give up while it captures
    torch.cuda.empty_cache()
    try:
        graph.begin(loop.hidden.device.index, *torch.cuda.graph_pool_handle())
        loop.launch(ConditionalNodes(graph))
        graph.end()
    except BaseException:
        # else the stream would go on capturing
        graph.abandon()
        raise
    return graph.replay


def has_conditional_nodes() -> bool:
    """Whether the compiled extension captures graphs with nodes."""
    return not available_backends("cuda")["cpp"]
