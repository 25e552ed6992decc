"""The graph engine: one CUDA graph of the device-resident loop for each bucket of batch sizes.

A replay costs one launch and one synchronisation.
"""

from __future__ import annotations

import collections
import math
import time
from typing import Any, NamedTuple

import torch

from earlyexit_kernels.engine.capturing import Captured, capture
from earlyexit_kernels.engine.inputs import Inputs
from earlyexit_kernels.engine.locks import ForkSafeLock
from earlyexit_kernels.engine.packing import check_first_tokens
from earlyexit_kernels.engine.resident import resident_unsupported_reason
from earlyexit_kernels.engine.resident_buffers import Arena, Bucket
from earlyexit_kernels.engine.view import ModelView
from earlyexit_kernels.ops.resident_exit import MAX_ROWS
from earlyexit_kernels.types import ExitOutput

#: Graphs kept for one model; the least recently used one is dropped.
MAX_GRAPHS = 16
#: Tries to capture one graph while another thread replaces weights.
MAX_CAPTURES = 3
#: Seconds after a capture that ran out of memory until it is tried again; the time doubles with each failure.
RETRY_SECONDS = 30.0
#: Tokens that the buffers of a bucket hold at most; a larger batch is split.
MAX_TOKENS = 65_536
MIN_LENGTH = 16


class CaptureError(RuntimeError):
    """No graph can be captured for a batch; the message names the reason."""


def bucket_of(rows: int, length: int) -> Bucket:
    """Return the smallest bucket that holds a batch; sizes are powers of two, so that few graphs are needed."""
    return Bucket(1 << (rows - 1).bit_length(), max(MIN_LENGTH, 1 << (length - 1).bit_length()))


def max_rows(length: int) -> int:
    """Return the largest number of rows of a length that one graph takes."""
    return max(1, min(MAX_ROWS, MAX_TOKENS // bucket_of(1, length).length))


class Key(NamedTuple):
    """The properties that a graph depends on."""

    bucket: Bucket
    backend: str
    criterion: Any
    dtype: torch.dtype
    device: torch.device


def key_of(view: ModelView, backend: str, rows: int, length: int) -> Key:
    """Return the key of a batch ``[N, S]`` that fits one graph."""
    weight = next(view.backbone.parameters())
    return Key(bucket_of(rows, length), backend, view.criterion, weight.dtype, weight.device)


class Refusal(NamedTuple):
    """A capture that failed.

    Attributes:
        reason: of the failure.
        wait: seconds until the capture may be tried again.
        until: end of that time, by `time.monotonic`.
    """

    reason: str
    wait: float
    until: float

    @classmethod
    def of(cls, error: Exception, bucket: Bucket, before: Refusal | None) -> Refusal:
        """Return the refusal after an error; only memory may be free later, other failures are final.

        Args:
            error: that the capture raised.
            bucket: that was captured.
            before: the refusal after the previous try, or None.
        """
        wait = math.inf
        if isinstance(error, torch.OutOfMemoryError):
            wait = RETRY_SECONDS if before is None else 2 * before.wait
        message = str(error).partition("\n")[0] or type(error).__name__
        return cls(f"capturing {bucket} failed: {message}", wait, time.monotonic() + wait)


class Graphs:
    """The CUDA graphs of one model, captured at first use, and again after modules or weights have been replaced.

    One batch runs at a time, on a stream of its own; threads wait for each other. Copies and pickles of the model start
    without graphs.
    """

    def __init__(self) -> None:
        self._lock = ForkSafeLock()
        self._captured: collections.OrderedDict[Key, Captured] = collections.OrderedDict()
        self._refused: dict[Key, Refusal] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        # one batch runs at a time, and no activation is read after it
        self._arena = Arena()

    def __deepcopy__(self, memo: Any) -> Graphs:
        return Graphs()

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphs, ()

    def forget(self) -> None:
        """Drop all graphs."""
        with self._lock:
            self._captured.clear()
            self._refused.clear()

    def unsupported_reason(
        self, view: ModelView, backend: str, rows: int, length: int, *, check_stale: bool = True
    ) -> str | None:
        """Return why `run` cannot answer a batch, as far as is known without a capture, or None. Changes nothing.

        Args:
            view, backend: as for `run`.
            rows, length: N and S.
            check_stale: check the model even if it has a graph, which may be stale. `run` does so in any case.
        """
        limit = max_rows(length)
        for key in {key_of(view, backend, chunk, length) for chunk in (min(rows, limit), rows % limit or limit)}:
            captured = self._captured.get(key)
            current = captured is not None and (not check_stale or captured.made_from.is_current(view.roots))
            if not current and (reason := self._capture_refusal(key, view)):
                return reason
        return None

    def run(self, view: ModelView, backend: str, inputs: Inputs) -> ExitOutput:
        """Answer a batch of any size.

        Args:
            view: of a model that `resident_unsupported_reason` supports.
            backend: of the exits; the kernels of the encoder are always Triton's.
            inputs: checked, on the model's device, N at least 1.

        Raises:
            CaptureError: no graph can be captured.
        """
        size = max_rows(inputs.length)
        with self._lock:
            outputs = [
                self._run_chunk(view, backend, inputs.rows_from(start, start + size), start)
                for start in range(0, inputs.rows, size)
            ]
        return outputs[0] if len(outputs) == 1 else ExitOutput.cat(outputs)

    def _run_chunk(self, view: ModelView, backend: str, inputs: Inputs, before: int) -> ExitOutput:
        """Answer rows that fit one graph, with so many rows of the request before them."""
        n, key = inputs.rows, key_of(view, backend, inputs.rows, inputs.length)
        if key.device not in self._streams:
            self._streams[key.device] = torch.cuda.Stream(key.device)
        stream, current = self._streams[key.device], torch.cuda.current_stream(key.device)
        # before a capture, which reads weights
        stream.wait_stream(current)
        captured = self._get_or_capture(key, view, stream)
        with torch.cuda.stream(stream):
            captured.loop.load(inputs)
            captured.replay()
            answers, exit_layer = captured.loop.answers[:n].clone(), captured.loop.exit_layer[:n].clone()
            captured.results.copy_(captured.loop.counts, non_blocking=True)
            done = stream.record_event()
        current.wait_stream(stream)
        for x in (answers, exit_layer):
            x.record_stream(current)
        done.synchronize()
        masked_first, *invalid = captured.results[:, 2].tolist()
        if captured.loop.pools_first and masked_first:
            mask: Any = inputs.attention_mask
            check_first_tokens((mask != 0).any(dim=1) & (mask[:, 0] == 0), before)
        return ExitOutput(answers, exit_layer, exit_layer.clone(), tuple(invalid))

    def _capture_refusal(self, key: Key, view: ModelView) -> str | None:
        """Return why no capture is tried, or None."""
        refused = self._refused.get(key)
        if refused is not None and time.monotonic() < refused.until:
            return refused.reason
        reason = resident_unsupported_reason(view, key.dtype)
        return f"a graph does not support this model: {reason}" if reason else None

    def _drop_stale(self, view: ModelView) -> None:
        """Drop graphs whose weights or modules have been replaced."""
        stale = [key for key, captured in self._captured.items() if not captured.made_from.is_current(view.roots)]
        for key in stale:
            del self._captured[key]

    def _get_or_capture(self, key: Key, view: ModelView, stream: Any) -> Captured:
        """Return the graph of the current weights; another thread may replace weights during a capture."""
        for attempt in range(MAX_CAPTURES + 1):
            captured = self._captured.get(key)
            if captured is not None and captured.made_from.is_current(view.roots):
                self._captured.move_to_end(key)
                return captured
            # otherwise its buffers would stay allocated during the capture
            captured = None
            self._drop_stale(view)
            if attempt < MAX_CAPTURES:
                self._add_capture(key, view, stream)
        raise CaptureError(f"the weights changed during each of {MAX_CAPTURES} captures")

    def _add_capture(self, key: Key, view: ModelView, stream: Any) -> None:
        if reason := self._capture_refusal(key, view):
            raise CaptureError(reason)
        try:
            self._captured[key] = self._capture(key, view, stream)
        except Exception as error:  # Triton's errors are not RuntimeErrors
            self._refused[key] = Refusal.of(error, key.bucket, self._refused.get(key))
            raise CaptureError(self._refused[key].reason) from error
        self._refused.pop(key, None)
        self._captured.move_to_end(key)
        while len(self._captured) > MAX_GRAPHS:
            self._captured.popitem(last=False)

    def _capture(self, key: Key, view: ModelView, stream: Any) -> Captured:
        try:
            return capture(view, key.bucket, key.backend, stream, self._arena)
        except torch.OutOfMemoryError:
            if not self._captured:
                raise
        # after the except clause, since the error holds the buffers of the failed capture. The other graphs hold memory
        # too, and can be captured again
        self._captured.clear()
        return capture(view, key.bucket, key.backend, stream, self._arena)
