"""The layers of a model on static buffers of one size, captured one by one."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from earlyexit_kernels.backbones.forms import hooked
from earlyexit_kernels.core.attention_plan import AttentionKind
from earlyexit_kernels.core.calls import LayerCalls, Request, RequestTokens, layer_calls
from earlyexit_kernels.core.packing import PackedBatch
from earlyexit_kernels.core.rows import Rows
from earlyexit_kernels.core.seal import Seal
from earlyexit_kernels.core.view import View
from earlyexit_kernels.cuda.levels import LevelSize
from earlyexit_kernels.ops import self_test

#: Greatest difference of a captured layer from the layer itself, over the greatest value of a hidden state.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


class CaptureError(RuntimeError):
    """A layer cannot be captured; its buffers hold what it computed eagerly."""


class Records(Protocol):
    """Captures calls; see `record.Recorder`."""

    def record(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """Capture a call; return what it returned and the function that replays it."""


@dataclass(frozen=True)
class CapturedLayer:
    """A captured layer.

    Attributes:
        replay: runs it in place on the buffers of its level.
        seal: of its modules, whose weights may change in place.
    """

    replay: Callable[[], None]
    seal: Seal


@dataclass
class Level:
    """Static buffers for the rows of a batch, and the layers that have been captured on them.

    What layers take besides hidden states (rotary embeddings, masks, rectangles) is made from offsets and positions by
    a capture of its own, `prepare`, which is replayed for each batch. It has to make the masks of every kind of
    attention that a layer asks for, so nothing is captured at the first batch, which shows the kinds.

    Attributes:
        size: of the buffers.
        hidden: ``[1, tokens, H]``; tokens of no row hold any values.
        offsets, row_ids: ``[rows + 1]`` and ``[rows]`` int32; rows that are not there have no tokens and id -1.
        request: what layers need to know about the rows, from static buffers, or None.
        kinds: of attention, met so far.
        calls: how layers are called on the buffers.
        prepare: replays what made `calls`; None if they were made eagerly.
        sources: seal of the modules that `calls` were made from.
        captured: layers by 1-based number.
        refused: why nothing is captured here, ``""`` if that has not failed.
    """

    size: LevelSize
    hidden: Tensor
    offsets: Tensor
    row_ids: Tensor
    request: Request | None
    kinds: set[AttentionKind] = field(default_factory=set)
    calls: LayerCalls | None = None
    prepare: Callable[[], None] | None = None
    sources: Any = None
    captured: dict[int, CapturedLayer] = field(default_factory=dict)
    refused: str = ""

    @staticmethod
    @torch.inference_mode(False)
    @torch.no_grad()
    def new(size: LevelSize, hidden: Tensor, request: Request | None) -> Level:
        """Return a level for batches like the one with these tokens ``[T, H]``."""
        integers = functools.partial(torch.zeros, dtype=torch.int32, device=hidden.device)
        static = request
        if isinstance(request, RequestTokens):
            places = torch.zeros(2, size.tokens, dtype=torch.int64, device=hidden.device)
            static = dataclasses.replace(request, positions=places[0], columns=places[1])
        buffer = torch.zeros(1, size.tokens, hidden.shape[1], dtype=hidden.dtype, device=hidden.device)
        return Level(size, buffer, integers(size.rows + 1), integers(size.rows), static)

    @torch.inference_mode(False)
    @torch.no_grad()
    def load(self, view: View, rows: Rows, recorder: Records | None) -> Rows:
        """Copy rows and their tokens into the buffers, make `calls` for them, and return them there.

        Args:
            view: of the model.
            rows: no more than there is room for.
            recorder: captures what makes `calls`; None: it is made eagerly.

        Raises:
            Exception: of the capture.
        """
        count, tokens, batch = rows.rows, rows.hidden.shape[0], rows.batch
        self.hidden[0, :tokens].copy_(rows.hidden)
        self.row_ids[:count].copy_(batch.row_ids)
        self.row_ids[count:].fill_(-1)
        self.offsets[: count + 1].copy_(batch.offsets)
        self.offsets[count + 1 :].copy_(batch.offsets[-1:].expand(self.size.rows - count))
        if isinstance(rows.request, RequestTokens) and isinstance(self.request, RequestTokens):
            self.request = dataclasses.replace(self.request, arguments=rows.request.arguments)
            self._load_positions(rows.request)
        else:
            self.request = rows.request
        self._make_calls(view, recorder)
        loaded = PackedBatch(None, self.offsets[: count + 1], self.row_ids[:count], None, batch.longest)
        return dataclasses.replace(rows, hidden=self.hidden[0, :tokens], batch=loaded)

    def _load_positions(self, request: RequestTokens) -> None:
        static: Any = self.request
        index, place = request.places_of(self.offsets, self.row_ids, self.size.tokens)
        static.positions.copy_(request.positions[index])
        static.columns.copy_(place if request.columns is None else request.columns[index])

    def _make_calls(self, view: View, recorder: Records | None) -> None:
        if self.request is None and not self.kinds:  # the plan is the buffers themselves
            self.calls = self.calls or self._made()
            return
        if recorder is not None and self.prepare is not None and self.sources.holds(_sources(view)):
            self.prepare()
            return
        self.forget()
        self.calls = self._made()  # what modules make lazily is made before a capture
        if recorder is not None:
            self.sources = Seal(_sources(view))
            self.calls, self.prepare = recorder.record(self._made)
            self.prepare()

    def _made(self) -> LayerCalls:
        rows = PackedBatch(None, self.offsets, self.row_ids, None, self.size.longest)
        calls = layer_calls(rows, self.hidden, self.request)
        for kind in self.kinds:
            calls.plan.rectangle(self.size.tokens).masks_of(kind, self.hidden.device)
        return calls

    def forget(self) -> None:
        """Drop what has been captured and prepared."""
        self.calls = self.prepare = self.sources = None
        self.captured.clear()

    def release(self) -> None:
        """Keep the memory of the buffers from others until the work that is queued on the current stream is done.

        The stream on which they were made does not wait for that of later batches.
        """
        if self.hidden.device.type == "cuda":
            places = self.request if isinstance(self.request, RequestTokens) else None
            static = [self.hidden, self.offsets, self.row_ids, *((places.positions, places.columns) if places else ())]
            for buffer in static:
                buffer.record_stream(torch.cuda.current_stream(buffer.device))

    @torch.inference_mode(False)
    @torch.no_grad()
    def run(self, layer: int, run_layer: Any, recorder: Records | None) -> None:
        """Run 1-based `layer` in place on the tokens in the buffers, and capture it if it has not been.

        Args:
            layer, run_layer: of the family.
            recorder: captures it; None: it runs eagerly.

        Raises:
            CaptureError: the capture failed, or computes something else than the layer.
        """
        calls: Any = self.calls
        captured = self.captured.get(layer)
        if recorder is not None and captured is not None and captured.seal.holds([run_layer]):
            captured.replay()
            return
        before = self.hidden if recorder is None else self.hidden.clone()
        after = calls.run(layer, run_layer, before)
        self.hidden.copy_(after)
        if recorder is None or self._new_kinds() or any(map(hooked, run_layer.modules())):
            return
        try:
            self.captured[layer] = self._capture(layer, run_layer, recorder, before, after)
        except Exception as error:  # of almost any class
            raise CaptureError(f"{type(error).__name__}: {error}") from error
        finally:
            self.hidden.copy_(after)

    def _capture(
        self, layer: int, run_layer: nn.Module, recorder: Records, before: Tensor, after: Tensor
    ) -> CapturedLayer:
        """Capture a layer, and compare what it makes of `before` with what the layer itself made, `after`."""
        calls: Any = self.calls
        seal = Seal([run_layer])
        _, replay = recorder.record(lambda: self.hidden.copy_(calls.run(layer, run_layer, self.hidden)))
        if self_test.switched_on():
            self.hidden.copy_(before)
            replay()
            if not self._holds(after):
                raise ArithmeticError(f"layer {layer} computes something else when it is captured")
        return CapturedLayer(replay, seal)

    def _holds(self, expected: Tensor) -> bool:
        """Compare the tokens of rows in the buffers."""
        real = torch.arange(self.size.tokens, device=self.hidden.device)[:, None] < self.offsets[-1]
        got, expected = (torch.where(real, x[0], 0.0) for x in (self.hidden, expected))
        scale = expected.nan_to_num(0.0, 0.0, 0.0).abs().max()
        apart = torch.where(got.isnan() & expected.isnan(), 0.0, (got - expected).abs())
        return bool((apart <= TOLERANCES[got.dtype] * scale).all())

    def _new_kinds(self) -> set[AttentionKind]:
        calls: Any = self.calls
        return {kind for plan in calls.plan.rectangles.values() for kind in plan.masks} - self.kinds

    def finish(self) -> None:
        """After a batch, note the kinds of attention that its layers asked for."""
        new = set() if self.calls is None else self._new_kinds()
        if new or self.refused:
            self.kinds |= new
            self.forget()


def _sources(view: View) -> list[nn.Module]:
    """Return the modules that `LayerCalls` may be made from: those beside the layers."""
    layers = set(view.layers)
    beside = [part for part in view.backbone.children() if layers.isdisjoint(part.modules())]
    return [*beside, *view.adapter.beside_layers(view.backbone)]


def pads_rows(view: View) -> bool:
    """Return whether layers of a model compute attention on padded rows."""
    adapter, caps = view.adapter, getattr(view.backbone.config, "attn_logit_softcapping", None)
    own = adapter.rectangle_arguments is not None or adapter.window is not None or caps is not None
    return own or view.dtype == torch.float64
