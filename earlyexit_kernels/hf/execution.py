"""What a model keeps of how it runs: the back-end of the ops, the kind of encoder layers, when rows move together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from earlyexit_kernels import backends
from earlyexit_kernels.criteria import Criterion
from earlyexit_kernels.engine.choice import ENGINES, Choice, Explanation, fastest
from earlyexit_kernels.engine.fused_layers import FusedLayers, why_not_onednn
from earlyexit_kernels.engine.graphs import CaptureError, Graphs
from earlyexit_kernels.engine.packing import PACKED_ATTENTION
from earlyexit_kernels.engine.resident import Parts
from earlyexit_kernels.errors import BackendUnavailableError
from earlyexit_kernels.types import ExitOutput

logger = logging.getLogger("earlyexit_kernels")

LAYERS = ("auto", "family", "fused")
IN_TRAINING = "the model is in train mode, where every row runs all layers; call model.eval()"
ATTENTION_IS_FIXED = (
    "attn_implementation can't be chosen: an early-exit model packs the rows of a batch, and only its own attention "
    f"({PACKED_ATTENTION!r}) keeps them apart"
)


class RuntimeChoices(PreTrainedModel):
    """Base of the model, which brings `backbone`, its `adapter`, `heads` and the criterion."""

    backbone: Any
    adapter: Any
    heads: Any
    _criterion: Any
    compaction = "auto"
    _backend = "auto"
    _layers = "auto"
    _engine = "auto"
    #: What was said of a choice, so that it is said once.
    _said = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._fused = FusedLayers()
        self._graphs = Graphs()
        self._said_of_engine: set[str] = set()

    @property
    def backend(self) -> str:
        """The back-end of the ops on this model's device; a float64 model runs on torch alone."""
        return self._resolved(self._backend)

    def _resolved(self, backend: str) -> str:
        name = backends.resolve(backend, self.device.type)
        if self.dtype == torch.float64 and backend not in ("auto", "torch"):
            raise BackendUnavailableError(
                f"backend {backend!r} can't run a float64 model; use 'auto' or 'torch', or call model.float()"
            )
        return "torch" if self.dtype == torch.float64 else name

    def set_backend(self, backend: str) -> None:
        """Choose the back-end of the ops: ``"auto"``, ``"torch"``, ``"triton"`` or ``"cpp"``.

        Raises:
            ValueError: an unknown name.
            BackendUnavailableError: it can't run on this model's device, or in float64.
        """
        self._resolved(backend)
        self._backend = backend

    @property
    def parts(self) -> Parts:
        """What the resident loop of the graph engine runs."""
        return self._parts_with(self._criterion)

    def _parts_with(self, rule: Criterion) -> Parts:
        return Parts(self.adapter, self.backbone, self.heads, rule, self.config.num_labels)

    def set_engine(self, engine: str) -> None:
        """Choose how eval mode runs a batch.

        Args:
            engine: ``"eager"``: layer by layer, on any device. ``"graph"``: a CUDA graph for each size of batch,
                captured when first met, that asks the host nothing until the batch is answered; what it can't hold runs
                eagerly, which is said once. ``"auto"``: the faster one by a measured table, `explain` tells.

        Raises:
            ValueError: an unknown name.
            BackendUnavailableError: ``"graph"``, and this model isn't on a CUDA device, or Triton is missing.
        """
        if engine not in ENGINES:
            raise ValueError(f"engine: expected one of {ENGINES}, got {engine!r}")
        kind = self.device.type
        if engine == "graph" and kind != "cuda":
            raise BackendUnavailableError(f"engine 'graph' runs on CUDA, the model is on {kind!r}; move it first")
        if engine == "graph":
            backends.resolve("triton", kind)
        self._engine = engine
        self._graphs.forget()

    def engine_for(self, rows: int, length: int, *, parts: Parts | None = None, checked: bool = False) -> Choice:
        """The engine that eval mode takes for ``[N, S]``, and why.

        Args:
            rows, length: N and S.
            parts: with the criterion of the pass; default: of the model as it is now.
            checked: as for `Graphs.why_not`.
        """
        engine = self._engine
        if engine == "eager":
            return Choice("eager", "it was asked for")
        if self.device.type != "cuda":
            return Choice("eager", "graphs are for CUDA")
        if torch.is_autocast_enabled("cuda"):
            return Choice("eager", "a graph's kernels know no autocast")
        choice = Choice("graph", "it was asked for")
        if engine == "auto":
            choice = fastest(torch.cuda.get_device_name(self.device), rows, length)
        if choice.name == "graph" and (reason := self._why_no_graph(parts or self.parts, rows, length, checked)):
            return Choice("eager", reason)
        return choice

    def _why_no_graph(self, parts: Parts, rows: int, length: int, checked: bool) -> str:
        if missing := backends.available_backends("cuda")["triton"]:
            return f"a graph's kernels are Triton's: {missing}"
        if self.backend == "torch":
            return "back-end 'torch' reads counts from the device, which a graph can't"
        return self._graphs.why_not(parts, self.backend, rows, length, checked=checked)

    def explain(self, input_ids: torch.Tensor, **batch: Any) -> Explanation:
        """Tell how the model would run a batch as it is now, and why. Changes nothing.

        Args:
            input_ids: ``[N, S]``.
            batch: the other inputs, which don't matter here.

        Raises:
            ValueError: ids of another shape.
        """
        if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2:
            got = list(input_ids.shape) if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
            raise ValueError(f"explain: expected input_ids of shape [N, S], got {got}")
        if self.training:
            return Explanation(Choice("eager", IN_TRAINING), Choice("family", IN_TRAINING), self.backend)
        reason = self._why_not_fused()
        asked = "they were asked for" if self._layers == "fused" else "they can be had and are faster"
        layers = Choice("family", reason) if reason else Choice("fused", asked)
        return Explanation(self.engine_for(*input_ids.shape, checked=True), layers, self.backend)

    @torch.compiler.disable
    def from_graph(
        self, ids: torch.Tensor, *others: torch.Tensor | None, rule: Criterion | None = None
    ) -> ExitOutput | None:
        """The answers to a batch from a CUDA graph, or None where it has to run eagerly.

        Each reason for that is said once, and so is what ``"auto"`` chose.

        Args:
            ids: ``[N, S]`` int64.
            others: attention_mask, token_type_ids and position_ids, as for the model.
            rule: the criterion of the pass; default: the model's.

        Raises:
            RuntimeError: within somebody's capture, which could hold neither.
        """
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the current stream is capturing a CUDA graph, and what a batch runs hangs on its data; capture "
                "model.fixed_depth() instead"
            )
        if not ids.numel():
            return None
        parts = self.parts if rule is None else self._parts_with(rule)
        choice = self.engine_for(*ids.shape, parts=parts)
        if self._engine == "auto" and self.device.type == "cuda":
            self._say_of_engine(logging.INFO, f"engine 'auto' chose {choice.name!r}: {choice.reason}")
        if choice.name == "graph":
            try:
                return self._graphs.run(parts, self.backend, ids, *others)
            except CaptureError as error:
                self._say_of_engine(logging.WARNING, f"engine {self._engine!r} fell back to 'eager': {error}")
        elif self._engine == "graph":
            self._say_of_engine(logging.WARNING, f"engine 'graph' fell back to 'eager': {choice.reason}")
        return None

    def _say_of_engine(self, level: int, message: str) -> None:
        """Once each."""
        if message not in self._said_of_engine:
            self._said_of_engine.add(message)
            logger.log(level, "%s", message)

    @property
    def layer_kind(self) -> str:
        """Which encoder layers a batch in eval mode runs now: ``"fused"``, or the family's own, ``"family"``."""
        return "family" if self._why_not_fused() else "fused"

    def set_layers(self, layers: str) -> None:
        """Choose the encoder layers of eval mode; training always runs the family's own.

        Args:
            layers: ``"family"``: its own. ``"fused"``: the same numbers, up to rounding, in fewer steps, on the CPU,
                from packed copies of the weights, which take about as much memory again. The copies are made at the
                first batch and again when a weight has changed; `refresh` tells which changes are detected.
                ``"auto"``: fused where they can be had. Under autocast and `torch.compile` the family's own run
                whatever was chosen.

        Raises:
            ValueError: an unknown name.
            BackendUnavailableError: ``"fused"``, and this model can't have them.
        """
        if layers not in LAYERS:
            raise ValueError(f"layers: expected one of {LAYERS}, got {layers!r}")
        before, self._layers = self._layers, layers
        self._fused.forget()
        try:
            self._why_not_fused()
        except BackendUnavailableError:
            self._layers = before
            raise

    def refresh(self) -> None:
        """Drop packed copies of weights and CUDA graphs; the next batch makes them again.

        Needed only after a change that no check detects. Before each batch the model compares its modules, their
        attributes, the address of each weight, and of each copied weight the version counter and a few elements: that
        detects optimizer steps, loaded states, and replaced modules and tensors. It misses a write to other elements
        than those, through something that leaves the version counter alone: ``weight.data``, a NumPy or DLPack view,
        or inference mode.
        """
        self._fused.forget()
        self._graphs.forget()

    def train(self, mode: bool = True) -> Any:
        """As in torch; packed copies of weights and graphs are dropped, since the weights will change."""
        if mode:
            self.refresh()
        return super().train(mode)

    def inference_layers(self) -> Sequence[Callable[..., Any]]:
        """The L encoder layers of a pass in eval mode, ``layer(hidden, None, plan=...)``.

        Raises:
            BackendUnavailableError: fused layers were asked for and can't be had any more.
        """
        fused, reason = self._fused_layers()
        if self._layers == "auto" and self._said != (said := reason or "fused"):
            self._said = said
            self._announce(reason)
        return self.adapter.layers(self.backbone) if fused is None else fused

    def _announce(self, reason: str) -> None:
        """Say once what 'auto' chose, as a warning where something is missing."""
        if reason:
            logger.info("layers 'auto' chose 'family': %s", reason)
            return
        missing = why_not_onednn(self.dtype)
        level = logging.WARNING if missing and self.dtype == torch.float32 else logging.INFO
        logger.log(level, "layers 'auto' chose 'fused'%s", f" with torch's own products: {missing}" if missing else "")

    def _fused_layers(self) -> tuple[Sequence[Callable[..., Any]] | None, str]:
        """The fused layers, or None and why not."""
        if reason := self._why_not_asked():
            return None, reason
        fused, reason = self._fused.of(self.adapter, self.backbone)
        self._refuse_fused(reason)
        return fused, reason

    def _why_not_fused(self) -> str:
        """Empty where the next batch runs fused layers, else why not; packs nothing."""
        if reason := self._why_not_asked():
            return reason
        reason = self._fused.why_not(self.adapter, self.backbone)
        self._refuse_fused(reason)
        return reason

    def _why_not_asked(self) -> str:
        """What stands against fused layers whatever the layers are."""
        if self._layers == "family":
            return "they were asked for"
        if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return "autocast or torch.compile is at work"
        kind = self.device.type
        reason = "" if kind == "cpu" else f"fused layers run on the CPU, the model is on {kind!r}"
        self._refuse_fused(reason)
        return reason

    def _refuse_fused(self, reason: str) -> None:
        if reason and self._layers == "fused":
            raise BackendUnavailableError(f"layers 'fused' can't run here: {reason}; use 'auto' or 'family'")

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """Refused: packed rows need the packed attention."""
        raise ValueError(ATTENTION_IS_FIXED)
