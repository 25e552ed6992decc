"""How a model runs its batches: back-end of the ops, engine, kind of encoder layers, compaction."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from earlyexit_kernels import backends
from earlyexit_kernels.criteria import RULES, check_known, resolve_backend, supported_backends
from earlyexit_kernels.engine import eager
from earlyexit_kernels.engine.capturing import nodes_for
from earlyexit_kernels.engine.choice import ENGINES, REQUESTED, Choice, Explanation, fastest
from earlyexit_kernels.engine.embedding import embed_rows
from earlyexit_kernels.engine.encoder import family_encoder
from earlyexit_kernels.engine.full_depth import TraceOptions, trace_exits
from earlyexit_kernels.engine.graphs import CaptureError, Graphs
from earlyexit_kernels.engine.inputs import Inputs
from earlyexit_kernels.engine.invalid import InvalidRows
from earlyexit_kernels.engine.replay import replay
from earlyexit_kernels.engine.view import ModelView
from earlyexit_kernels.errors import BackendUnavailableError
from earlyexit_kernels.hf.layer_choice import LayerChoice
from earlyexit_kernels.types import Answers, ExitOutput, ExitTrace

logger = logging.getLogger("earlyexit_kernels")

IN_TRAINING = "the model is in train mode, where every row runs all layers; call model.eval()"


class Execution:
    """The execution options of one model, its packed weights and its CUDA graphs.

    Methods take a view of the model with the criterion of the pass, so that another thread can set a criterion during a
    pass. Copies and pickles keep the options and start without packed weights and graphs.

    Args:
        layer_macs: multiply-adds of one encoder layer on one token.

    Attributes:
        layers: the kind of encoder layers, and their packed weights.
        graphs: captured CUDA graphs.
        invalid: count of rows with invalid logits.
        logged: messages about automatic choices and fallbacks, each of which is logged once.
    """

    def __init__(self, layer_macs: int) -> None:
        self.layers = LayerChoice()
        self.graphs = Graphs()
        self.invalid = InvalidRows()
        self.logged: set[str] = set()
        self._layer_macs = layer_macs
        self._backend = self._engine = self._compaction = "auto"

    @property
    def compaction(self) -> str:
        """When live rows are moved together: ``"auto"``, ``"always"`` or ``"never"``."""
        return self._compaction

    @compaction.setter
    def compaction(self, compaction: str) -> None:
        _check_option("compaction", compaction, eager.COMPACTIONS)
        self._compaction = compaction

    def backend(self, view: ModelView) -> str:
        """Return the back-end of the exits on the device of a model.

        That of the other ops is the same, except where ``"auto"`` finds fewer back-ends for a registered criterion.

        Raises:
            BackendUnavailableError: the requested one cannot run there or in float64, or does not implement the
                criterion.
        """
        return _resolved(self._backend, view)

    def check_criterion(self, view: ModelView) -> None:
        """Refuse a criterion that the requested back-end does not implement."""
        if self._backend != "auto" and self._backend not in supported_backends(view.criterion.exit_rule.name):
            _resolved(self._backend, view)

    def set_backend(self, view: ModelView, backend: str) -> None:
        """Choose the back-end; see the model's method."""
        _resolved(backend, view)
        self._backend = backend

    @property
    def engine(self) -> str:
        """The requested engine: ``"auto"``, ``"eager"`` or ``"graph"``."""
        return self._engine

    def set_engine(self, view: ModelView, engine: str) -> None:
        """Choose the engine; see the model's method."""
        _check_option("engine", engine, ENGINES)
        if engine == "graph":
            kind = view.device.type
            if kind != "cuda":
                raise BackendUnavailableError(f"engine 'graph' runs on CUDA, the model is on {kind!r}; move it first")
            backends.resolve("triton", view.device)
        self._engine = engine
        self.graphs.forget()

    def refresh(self) -> None:
        """Drop packed weights and CUDA graphs."""
        self.layers.fused.forget()
        self.graphs.forget()

    def explain(self, view: ModelView, rows: int, length: int, *, training: bool) -> Explanation:
        """Return how a batch ``[N, S]`` would run in train or eval mode. Changes nothing."""
        if training:
            return Explanation(Choice("eager", IN_TRAINING), Choice("family", IN_TRAINING), self.backend(view))
        engine, backend = self.choose_engine(view, rows, length, check_stale=True), self.backend(view)
        nodes = nodes_for(view, backend) if engine.name == "graph" else None
        layers = self.layers.kind(view)
        fused = self.layers.products(view) if layers.name == "fused" else ()
        return Explanation(engine, layers, backend, nodes, *fused)

    @torch.no_grad()
    def run(self, view: ModelView, inputs: Inputs, *, strict: bool) -> ExitOutput:
        """Answer a batch; rows leave where the criterion says so.

        Args:
            view: of the model.
            inputs: checked.
            strict: raise on invalid logits.

        Raises:
            InvalidLogitsError: there are some, and `strict` is set.
            ValueError: the class of the criterion was registered again since.
        """
        result = self._from_graph(view, inputs)
        if result is None:
            result = self._start(view, inputs, strict).run() if inputs.rows else _no_answers(view)
        self.invalid.add(result.invalid_rows, strict)
        return result

    # parts may be asked for in and outside of inference mode, whose tensors cannot be written to outside of it
    @torch.inference_mode(False)
    @torch.no_grad()
    def stream(self, view: ModelView, inputs: Inputs, *, strict: bool) -> Iterator[Answers]:
        """Yield the answers of a batch as rows leave, or all at once from a CUDA graph; see `run`."""
        result = self._from_graph(view, inputs)
        if result is not None:
            rows = result.exit_layer.argsort(stable=True)
            yield Answers(rows, result.logits[rows], result.exit_layer[rows])
        elif inputs.rows:
            result = yield from self._start(view, inputs, strict).parts()
        if result is not None:
            self.invalid.add(result.invalid_rows, strict)

    def _from_graph(self, view: ModelView, inputs: Inputs) -> ExitOutput | None:
        """Check the criterion, and answer a batch by a CUDA graph if it can run there."""
        if view.criterion.exit_rule.name not in RULES:
            check_known(view.criterion.exit_rule)
        return self.run_graph(view, inputs) if inputs.input_ids.is_cuda else None

    def _start(self, view: ModelView, inputs: Inputs, strict: bool) -> eager.Pass:
        """Embed a batch of at least one row for the eager loop."""
        encoder, with_keys = self.layers.encoder(view), view.criterion.exit_rule.uses_keys
        hidden, batch, keys, request = embed_rows(view, inputs, encoder.embed, with_keys=with_keys)
        options = eager.RunOptions(
            backend=_requested(self._backend, view),
            compaction=self._compaction,
            strict=strict,
            layer_macs=self._layer_macs,
        )
        parts = view.heads, view.criterion, view.classes
        return eager.start(hidden, batch, encoder.layers, *parts, options, keys, view.exit_norm, request)

    @torch.no_grad()
    def run_full_depth(self, view: ModelView, inputs: Inputs, *, strict: bool, problem_type: str) -> ExitOutput:
        """Run every layer on every row; the answers are those of the criterion.

        Args:
            view, inputs, strict, problem_type: as for `trace`.
        """
        trace = self.trace(view, inputs, TraceOptions(), strict=strict, problem_type=problem_type)
        answers, exit_layer = replay(trace, view.criterion, problem_type=problem_type, backend=self._backend)
        return full_depth_output(trace, answers, exit_layer)

    def trace(
        self,
        view: ModelView,
        inputs: Inputs,
        options: TraceOptions,
        *,
        strict: bool,
        problem_type: str,
        training: bool = False,
    ) -> ExitTrace:
        """Run every layer and exit on every row.

        Args:
            view: of the model.
            inputs: checked.
            options: what to keep.
            strict: raise on invalid logits.
            problem_type: of the model.
            training: run the layers of the family. Otherwise those of eval mode run, and rows that a replay can draw
                random numbers for get keys.

        Raises:
            ValueError: the criterion skips layers, and this is not training.
            InvalidLogitsError: there are invalid logits, and `strict` is set.
        """
        if not training and view.criterion.skip_from is not None:
            raise ValueError(
                f"criterion {view.criterion.name!r} skips layers, which changes all later hidden states, so a "
                "full-depth pass does not contain its answers. Run the model, or choose another criterion for the "
                "trace (None is full depth)"
            )
        with_keys = not training and "halting" in view.heads.aux_names
        if not inputs.rows:
            return _no_exits(view, problem_type, with_keys=with_keys, training=training)
        encoder = family_encoder(view) if training else self.layers.encoder(view)
        hidden, batch, keys, request = embed_rows(view, inputs, encoder.embed, with_keys=with_keys)
        trace = trace_exits(hidden, batch, encoder.layers, view.heads, options, keys, view.exit_norm, request)
        self.invalid.add_pass(trace.logits, strict, training=training)
        return dataclasses.replace(trace, problem_type=problem_type)

    @torch.compiler.disable
    def run_graph(self, view: ModelView, inputs: Inputs) -> ExitOutput | None:
        """Answer a batch by a CUDA graph, or return None where it must run eagerly; each reason is logged once.

        Raises:
            RuntimeError: the current stream is capturing a graph, which cannot hold either engine.
        """
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the current stream is capturing a CUDA graph, but the work per batch is data-dependent; capture "
                "model.fixed_depth() instead"
            )
        if not inputs.rows:
            return None
        choice = self.choose_engine(view, inputs.rows, inputs.length)
        if self._engine == "auto":
            self._log_once(logging.INFO, f"engine 'auto' chose {choice.name!r}: {choice.reason}")
        if choice.name == "graph":
            try:
                return self.graphs.run(view, self.backend(view), inputs)
            except CaptureError as error:
                self._log_once(
                    logging.WARNING, f"engine {self._engine!r} fell back to 'eager': {error}", error.__cause__
                )
        elif self._engine == "graph":
            self._log_once(logging.WARNING, f"engine 'graph' fell back to 'eager': {choice.reason}")
        return None

    def choose_engine(self, view: ModelView, rows: int, length: int, *, check_stale: bool = False) -> Choice:
        """Return the engine for a batch ``[N, S]`` and the reason.

        Args:
            view: of the model.
            rows, length: N and S.
            check_stale: as for `Graphs.unsupported_reason`.
        """
        if self._engine == "eager":
            return Choice("eager", REQUESTED)
        if view.device.type != "cuda":
            return Choice("eager", "graphs require CUDA")
        if view.replica_reason is not None:
            return Choice("eager", view.replica_reason)
        if torch.is_autocast_enabled("cuda"):
            return Choice("eager", "the kernels of a graph do not support autocast")
        choice = Choice("graph", REQUESTED)
        if self._engine == "auto":
            choice = fastest(torch.cuda.get_device_name(view.device), rows, length)
        if choice.name == "graph" and (reason := self._graph_unsupported_reason(view, rows, length, check_stale)):
            return Choice("eager", reason)
        return choice

    def _graph_unsupported_reason(self, view: ModelView, rows: int, length: int, check_stale: bool) -> str | None:
        if missing := backends.available_backends(view.device)["triton"]:
            return f"a graph requires Triton's kernels: {missing}"
        backend = self.backend(view)
        if backend == "torch":
            return "back-end 'torch' reads counts from the device, which a graph cannot do"
        return self.graphs.unsupported_reason(view, backend, rows, length, check_stale=check_stale)

    def _log_once(self, level: int, message: str, error: BaseException | None = None) -> None:
        """Log a message, with the traceback of an error, if it has not been logged."""
        if message not in self.logged:
            self.logged.add(message)
            logger.log(level, "%s", message, exc_info=error)


def full_depth_output(trace: ExitTrace, answers: Tensor | None = None, exit_layer: Tensor | None = None) -> ExitOutput:
    """Return the output of a full-depth pass; by default the last exit answers every row."""
    rows, depth, _ = trace.logits.shape
    depths = torch.full((rows,), depth, dtype=torch.int64, device=trace.logits.device)
    answers = trace.logits[:, -1] if answers is None else answers
    return ExitOutput(answers, depths if exit_layer is None else exit_layer, depths.clone(), (), trace)


def _check_option(name: str, value: str, options: Sequence[str]) -> None:
    if value not in options:
        raise ValueError(f"{name}: expected one of {options}, got {value!r}")


def _resolved(backend: str, view: ModelView) -> str:
    """Return the back-end of the exits that a name stands for on a model's device."""
    return resolve_backend(view.criterion.exit_rule.name, _requested(backend, view), view.device)


def _requested(backend: str, view: ModelView) -> str:
    """Return the name of the back-end that the ops of a model run on; a float64 model runs on torch only."""
    is_float64 = view.dtype == torch.float64
    if is_float64 and backend not in ("auto", "torch"):
        raise BackendUnavailableError(
            f"backend {backend!r} does not support a float64 model; use 'auto' or 'torch', or call model.float()"
        )
    return "torch" if is_float64 else backend


def _no_answers(view: ModelView) -> ExitOutput:
    """Return the answers to a batch without rows."""
    device = view.device
    none = torch.zeros(0, dtype=torch.int64, device=device)
    return ExitOutput(torch.zeros(0, view.classes, device=device, dtype=torch.float32), none, none.clone())


def _no_exits(view: ModelView, problem_type: str, *, with_keys: bool, training: bool) -> ExitTrace:
    """Return the trace of a batch without rows."""
    device, depth = view.device, len(view.layers)
    aux = {name: torch.zeros(0, depth, device=device) for name in view.heads.aux_names if name != "gate"}
    dtype = view.dtype if training else torch.float32
    keys = torch.zeros(0, dtype=torch.int64, device=device) if with_keys else None
    logits = torch.zeros(0, depth, view.classes, device=device, dtype=dtype)
    return ExitTrace(logits, aux, keys, problem_type=problem_type)
