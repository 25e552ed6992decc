"""Our engines: converted models, by how their layers run and by the back-end of the ops."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

from benchmarks.end_to_end.models import Model, Subject
from benchmarks.machine import NotMeasuredError
from earlyexit_kernels.engine.inputs import Inputs
from earlyexit_kernels.engine.view import ModelView
from earlyexit_kernels.errors import BackendUnavailableError
from earlyexit_kernels.types import ExitOutput

FAMILY_LAYERS, FUSED_LAYERS, GRAPH = "family layers", "fused layers", "graph"


def _eager(model: Model, layers: str) -> None:
    model.set_engine("eager")
    model.set_layers(layers)


def _graph(model: Model) -> None:
    """Set the graph engine without its fall-back: eager runs are not timed under its name."""
    model.set_engine("graph")
    execution = model.execution
    run_graph = execution.run_graph

    def or_raise(view: ModelView, inputs: Inputs) -> ExitOutput:
        out = run_graph(view, inputs)
        if out is None:
            raise NotMeasuredError("; ".join(sorted(execution.logged)))
        return out

    execution.run_graph = or_raise


#: Engine -> function that sets it on a converted model.
ENGINES: dict[str, Callable[[Model], None]] = {
    FAMILY_LAYERS: functools.partial(_eager, layers="family"),
    FUSED_LAYERS: functools.partial(_eager, layers="fused"),
    GRAPH: _graph,
}


@functools.cache
def engine_model(
    subject: Subject, engine: str, backend: str = "auto", *, family: bool = False, stored: str = "float32"
) -> Model:
    """Return a subject's early-exit model under an engine and a back-end: its own module on the shared parameters.

    Args:
        subject: the model.
        engine: a name of `ENGINES`.
        backend: of the ops.
        family: with the family's own exits, the last of which is the plain model's head.
        stored: a model of its own for each type that packed weights are stored in; the caller sets it.

    Raises:
        NotMeasuredError: the back-end or the layers cannot run here.
    """
    source = subject.family if family else subject.model
    model = copy.deepcopy(source, {id(x): x for x in [*source.parameters(), *source.buffers()]})
    try:
        ENGINES[engine](model)
        model.set_backend(backend)
    except BackendUnavailableError as error:
        raise NotMeasuredError(str(error)) from error
    return model
