"""Captured layers: the family's own layers, each replayed as one CUDA graph on buffers of a few sizes.

A layer is 10 to 15 launches; captured it is one. Exits and compaction stay ordinary calls, so that a criterion, a
threshold or a back-end changes without a capture. The first batch of a size runs eagerly, the second captures the
layers that it reaches, each of which is compared with the layer itself, and later ones replay them.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from earlyexit_kernels.core.attention_plan import AttentionPlan, plan_attention
from earlyexit_kernels.core.encoder import Encoder, family_encoder
from earlyexit_kernels.core.loop import InPlace, Pass, Place, compaction_pays
from earlyexit_kernels.core.paths import Found
from earlyexit_kernels.core.rows import Rows
from earlyexit_kernels.core.view import Inputs, View
from earlyexit_kernels.cuda.level import CaptureError, Level, Records, pads_rows
from earlyexit_kernels.cuda.levels import level_size
from earlyexit_kernels.cuda.record import Recorder
from earlyexit_kernels.errors import Unsupported

logger = logging.getLogger("earlyexit_kernels")

#: Kinds of device that have graphs.
DEVICES = ("cuda",)
#: Seconds until something is captured again after memory ran out.
RETRY_SECONDS = 60.0
#: Levels of a model; a further one takes the place of that which was not used for longest.
MAX_LEVELS = 64


class CapturedLayers:
    """The captured layers of one model. Copies and pickles start without any.

    One batch runs on them at a time. A batch that another thread runs meanwhile runs eagerly and does not wait.
    """

    def __init__(self) -> None:
        self._levels: dict[tuple[Any, ...], Level] = {}
        self._recorders: dict[torch.device, Records] = {}
        self._busy = threading.Lock()
        #: Makes the current stream wait for the last batch.
        self._wait: Callable[[], None] = _nothing
        self._no_memory_until = 0.0
        self._logged: set[str] = set()

    def __deepcopy__(self, memo: Any) -> CapturedLayers:
        return CapturedLayers()

    def __reduce__(self) -> tuple[Any, ...]:
        return CapturedLayers, ()

    def place(self, view: View) -> Place:
        """Return where a batch runs: on captured layers, or as it is while another batch runs on them."""
        in_place = InPlace(view)
        if not self._busy.acquire(blocking=False):
            return in_place
        try:
            self._wait()
        except BaseException:
            self._busy.release()
            raise
        return OnLevels(self, in_place)

    def give_back(self, device: torch.device) -> None:
        """Let the next batch run on the captured layers, behind the work that is queued now."""
        self._wait = _behind(device) if device.type == "cuda" else _nothing
        self._busy.release()

    def load(self, view: View, rows: Rows) -> tuple[Level, Rows] | None:
        """Copy a batch into the buffers of a level; return that and the rows there, or None to leave them."""
        hidden = rows.hidden
        size = level_size(rows.rows, hidden.shape[0], rows.batch.longest, padded=pads_rows(view))
        if size is None:
            return None
        key = (size, hidden.dtype, hidden.device, hidden.shape[1])
        level = self._levels.pop(key, None)
        if level is not None:
            self._levels[key] = level  # the last one used
        recorder = None if level is None else self.recorder(hidden.device)
        if time.monotonic() < self._no_memory_until if level is None else level.refused:
            return None
        try:
            if level is None:
                while len(self._levels) >= MAX_LEVELS:
                    self._drop(next(iter(self._levels)))
                level = self._levels[key] = Level.new(size, hidden, rows.request)
            loaded = level.load(view, rows, recorder)
        except Exception as error:  # of almost any class
            self.refuse(level, error)
            return None
        called = LevelCalls(self, level, recorder, plan_attention(loaded.batch))
        return level, dataclasses.replace(loaded, called=called)

    def recorder(self, device: torch.device) -> Records:
        """Return what captures calls on a device."""
        if device not in self._recorders:
            self._recorders[device] = Recorder(device)
        return self._recorders[device]

    def _drop(self, key: tuple[Any, ...]) -> None:
        self._levels.pop(key).release()

    def refuse(self, level: Level | None, error: BaseException) -> None:
        """Capture nothing at a level any more, with one warning; if memory ran out, drop all levels for a while."""
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        if level is not None:
            level.refused = reason
        if isinstance(error, torch.OutOfMemoryError):
            for key in list(self._levels):
                self._drop(key)
            self._no_memory_until = time.monotonic() + RETRY_SECONDS
        if reason not in self._logged:
            self._logged.add(reason)
            logger.warning("a layer cannot be captured, and runs eagerly: %s", reason, exc_info=error)


def _nothing() -> None:
    """Wait for nothing."""


def _behind(device: torch.device) -> Callable[[], None]:
    """Return what makes the stream that is current then wait for the work that is queued now."""
    if torch.cuda.is_current_stream_capturing():  # an iterator over parts that is dropped in somebody's capture
        return lambda: torch.cuda.synchronize(device)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(device))
    return lambda: torch.cuda.current_stream(device).wait_event(done)


@dataclass(frozen=True)
class LevelCalls:
    """How layers are called on the rows of a level; a `core.calls.Calls`.

    Attributes:
        owner: of the level.
        level: whose buffers hold the rows.
        recorder: captures layers; None: they run eagerly.
        plan: by which exits attend.
    """

    owner: CapturedLayers
    level: Level
    recorder: Records | None
    plan: AttentionPlan

    def run(self, layer: int, run_layer: Any, hidden: Tensor) -> Tensor:
        """Run 1-based `layer` on the buffers, of which `hidden` is a part."""
        try:
            self.level.run(layer, run_layer, None if self.level.refused else self.recorder)
        except CaptureError as error:
            self.owner.refuse(self.level, error.__cause__ or error)
        return hidden


@dataclass
class OnLevels:
    """Places the rows of a batch on levels; a `core.loop.Place`.

    Attributes:
        owner: of the levels.
        in_place: places rows that fit no level.
        level: that holds the rows now, or None.
    """

    owner: CapturedLayers
    in_place: InPlace
    level: Level | None = None

    def put(self, rows: Rows) -> Rows:
        """Copy rows and tokens into the smallest level that holds them."""
        before, self.level = self.level, None
        if before is not None:
            before.finish()
        found = self.owner.load(self.in_place.view, rows)
        if found is None:
            return rows
        self.level, rows = found
        return rows

    def pays(self, rows: Rows, layers_left: int) -> bool:
        """Return whether to move the live rows together: where they fit a smaller level, which saves enough."""
        view, level = self.in_place.view, self.level
        if level is None or view.settings.compaction != "auto":
            return self.in_place.pays(rows, layers_left)
        smaller = level_size(rows.live, rows.live_tokens, rows.batch.longest, padded=pads_rows(view))
        if smaller is None or smaller.tokens >= level.size.tokens:
            return False
        macs, width = view.layer_macs * layers_left, rows.hidden.shape[1]
        return compaction_pays(level.size.tokens, smaller.tokens, width, macs, rows.hidden.device)

    def close(self) -> None:
        """End the batch."""
        if self.level is not None:
            self.level.finish()
        self.owner.give_back(self.in_place.view.device)


class Captured:
    """Answers by captured layers; a `core.paths.Path`. Copies and pickles start without captures."""

    name = "captured"

    def __init__(self) -> None:
        self.layers = CapturedLayers()

    def check(self, view: View) -> Found:
        """Return what runs the layers."""
        if view.device.type not in DEVICES:
            raise Unsupported(f"layers are captured on CUDA, the model is on {view.device.type!r}")
        if view.replica_reason:
            raise Unsupported(view.replica_reason)
        return Found("a layer is one launch")

    def encoder(self, view: View) -> Encoder:
        """Return the encoder of the family."""
        self.check(view)
        return family_encoder(view)

    def begin(self, view: View, inputs: Inputs) -> Pass:
        """Return the pass of a batch on levels."""
        encoder = self.encoder(view)
        return Pass(view, encoder, inputs, self.layers.place(view))
