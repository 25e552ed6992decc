"""Which path a batch takes, and what a model keeps for it: packed copies of weights, captured layers."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from earlyexit_kernels.core.encoder import Encoder, family_encoder
from earlyexit_kernels.core.full_depth import TraceOptions, trace_exits
from earlyexit_kernels.core.invalid import InvalidRows
from earlyexit_kernels.core.loop import Pass
from earlyexit_kernels.core.paths import REQUESTED, Eager, Explanation, Path, refusal
from earlyexit_kernels.core.replay import replay
from earlyexit_kernels.core.rows import embedded
from earlyexit_kernels.core.view import Inputs, View
from earlyexit_kernels.cpu.path import Fused
from earlyexit_kernels.criteria import RULES, check_known
from earlyexit_kernels.cuda.captured import Captured
from earlyexit_kernels.errors import Unsupported
from earlyexit_kernels.types import Answers, ExitOutput, ExitTrace

logger = logging.getLogger("earlyexit_kernels")

#: Kind of device -> the paths that "auto" tries, in order. Other devices run eagerly.
AUTO = {"cpu": ("fused", "eager"), "cuda": ("captured", "eager")}
IN_TRAINING = "the model is in train mode, where every row runs all layers; call model.eval()"
FAMILY_ONLY = "autocast or torch.compile is active"

Made = TypeVar("Made")


class Runner:
    """Runs the batches of one model. Copies and pickles of it start without packed and captured layers.

    Attributes:
        paths: by name.
        invalid: count of rows with invalid logits.
    """

    def __init__(self) -> None:
        self.paths: dict[str, Path] = {path.name: path for path in (Eager(), Fused(), Captured())}
        self.invalid = InvalidRows()
        self._said: set[str] = set()

    def forget(self) -> None:
        """Drop packed copies and captured layers."""
        self.paths = {name: type(path)() for name, path in self.paths.items()}

    def check(self, view: View) -> None:
        """Check that the path and the back-end that were asked for can run.

        Raises:
            ValueError: an unknown back-end.
            BackendUnavailableError: one of them cannot run; the message says why.
        """
        _ = view.exit_backend
        self._take(view, lambda path: path.check(view))

    def explain(self, view: View, *, training: bool) -> Explanation:
        """Return how a batch would run in train or eval mode. Changes nothing."""
        backend = view.exit_backend
        if training:
            return Explanation("eager", IN_TRAINING, backend)
        path, found, refused = self._take(view, lambda path: path.check(view))
        reason = refused or (REQUESTED if view.settings.path == path.name else found.reason)
        return Explanation(path.name, reason, backend, *found[1:])

    def _take(self, view: View, use: Callable[[Path], Made]) -> tuple[Path, Made, str]:
        """Use the first path that can run.

        Args:
            view: of the model.
            use: what a path is asked for; raises `Unsupported`.

        Returns:
            The path, what `use` returned, and why another one was refused, ``""`` if none was.

        Raises:
            BackendUnavailableError: the path that was asked for cannot run.
        """
        asked, refused = view.settings.path, ""
        ladder = AUTO.get(view.device.type, ("eager",)) if asked == "auto" else (asked,)
        if ladder != ("eager",) and (torch.compiler.is_compiling() or torch.is_autocast_enabled(view.device.type)):
            ladder, refused = ("eager",), FAMILY_ONLY
        for name in ladder:
            try:
                return self.paths[name], use(self.paths[name]), refused
            except Unsupported as why:
                refused = str(why)
        raise refusal(view, refused)

    def _ready(self, view: View, use: Callable[[Path], Made]) -> Made:
        """Return what the first path that can run is asked for, and log once what 'auto' chose."""
        path, made, refused = self._take(view, use)
        if view.settings.path == "auto" and refused != FAMILY_ONLY and (said := path.name + refused) not in self._said:
            self._said.add(said)
            _log(view, self.explain(view, training=False))
        return made

    @torch.no_grad()
    def run(self, view: View, inputs: Inputs) -> ExitOutput:
        """Answer a batch; rows leave where the criterion says so.

        Raises:
            InvalidLogitsError: invalid logits, in a strict model.
            ValueError: the class of the criterion was registered again since.
        """
        _check_registered(view)
        if not inputs.rows:
            return _no_answers(view)
        result = self._begin(view, inputs).run()
        self.invalid.add(result.invalid_rows, view.strict)
        return result

    # parts may be asked for in and outside of inference mode, whose tensors cannot be written to outside of it
    @torch.inference_mode(False)
    @torch.no_grad()
    def stream(self, view: View, inputs: Inputs) -> Iterator[Answers]:
        """Yield the answers of a batch as rows leave; see `run`."""
        _check_registered(view)
        if inputs.rows:
            result = yield from self._begin(view, inputs).parts()
            self.invalid.add(result.invalid_rows, view.strict)

    @torch.no_grad()
    def full_depth(self, view: View, inputs: Inputs) -> ExitOutput:
        """Run every layer on every row; the answers are those of the criterion."""
        trace = self.trace(view, inputs)
        answers, exit_layer = replay(trace, view.criterion, problem_type=view.task, backend=view.settings.backend)
        return full_depth_output(trace, answers, exit_layer)

    def trace(
        self, view: View, inputs: Inputs, options: TraceOptions | None = None, *, training: bool = False
    ) -> ExitTrace:
        """Run every layer and exit on every row.

        Args:
            view: of the model.
            inputs: checked.
            options: what to keep; default: all that can be read without gradients.
            training: run the layers of the family. Otherwise those of eval mode run, and rows that a replay can draw
                random numbers for get keys.

        Raises:
            ValueError: the criterion skips layers, and this is not training.
            InvalidLogitsError: invalid logits, in a strict model.
        """
        if not training and view.criterion.skip_from is not None:
            raise ValueError(
                f"criterion {view.criterion.name!r} skips layers, which changes all later hidden states, so a "
                "full-depth pass does not contain its answers. Run the model, or choose another criterion for the "
                "trace (None is full depth)"
            )
        with_keys = not training and "halting" in view.heads.aux_names
        if not inputs.rows:
            return _no_exits(view, with_keys=with_keys, training=training)
        encoder = family_encoder(view) if training else self._encoder(view)
        rows, keys = embedded(view, inputs, encoder.embed, with_keys=with_keys)
        trace = trace_exits(rows, encoder.layers, view.heads, options or TraceOptions(), keys)
        self.invalid.add_pass(trace.logits, view.strict, training=training)
        return dataclasses.replace(trace, problem_type=view.task)

    def _begin(self, view: View, inputs: Inputs) -> Pass:
        """Return the pass of a batch of at least one row."""
        if view.device.type == "cuda":
            _refuse_in_capture()
        return self._ready(view, lambda path: path.begin(view, inputs))

    def _encoder(self, view: View) -> Encoder:
        return self._ready(view, lambda path: path.encoder(view))


def _log(view: View, chosen: Explanation) -> None:
    """Log what 'auto' chose, as a warning if a float32 model runs on torch's own products."""
    slow = chosen.products == "torch" and view.dtype == torch.float32
    by = f", products by {chosen.products!r}: {chosen.why}" if chosen.products else f": {chosen.reason}"
    logger.log(logging.WARNING if slow else logging.INFO, "path 'auto' chose %r%s", chosen.path, by)


def _check_registered(view: View) -> None:
    if view.criterion.exit_rule.name not in RULES:
        check_known(view.criterion.exit_rule)


@torch.compiler.disable
def _refuse_in_capture() -> None:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the current stream is capturing a CUDA graph, but the work per batch is data-dependent; capture "
            "model.fixed_depth() instead"
        )


def full_depth_output(trace: ExitTrace, answers: Tensor | None = None, exit_layer: Tensor | None = None) -> ExitOutput:
    """Return the output of a full-depth pass; by default the last exit answers every row."""
    rows, depth, _ = trace.logits.shape
    depths = torch.full((rows,), depth, dtype=torch.int64, device=trace.logits.device)
    answers = trace.logits[:, -1] if answers is None else answers
    return ExitOutput(answers, depths if exit_layer is None else exit_layer, depths.clone(), (), trace)


def _no_answers(view: View) -> ExitOutput:
    """Return the answers to a batch without rows."""
    none = torch.zeros(0, dtype=torch.int64, device=view.device)
    return ExitOutput(torch.zeros(0, view.classes, device=view.device, dtype=torch.float32), none, none.clone())


def _no_exits(view: View, *, with_keys: bool, training: bool) -> ExitTrace:
    """Return the trace of a batch without rows."""
    device, depth = view.device, len(view.layers)
    aux = {name: torch.zeros(0, depth, device=device) for name in view.heads.aux_names if name != "gate"}
    dtype = view.dtype if training else torch.float32
    keys = torch.zeros(0, dtype=torch.int64, device=device) if with_keys else None
    logits = torch.zeros(0, depth, view.classes, device=device, dtype=dtype)
    return ExitTrace(logits, aux, keys, problem_type=view.task)
