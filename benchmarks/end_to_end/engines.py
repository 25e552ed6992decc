"""Our side: converted models, by the way their layers are run and by the back-end of the ops."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from benchmarks.end_to_end.models import Model, NotMeasuredError, Subject
from earlyexit_kernels.errors import BackendUnavailableError
from earlyexit_kernels.types import ExitOutput

FAMILY_LAYERS, FUSED_LAYERS, GRAPH = "family layers", "fused layers", "graph"


def _eager(model: Model, layers: str) -> None:
    model.set_engine("eager")
    model.set_layers(layers)


def _graph(model: Model) -> None:
    """Graphs or nothing: what would run eagerly without one isn't timed under its name."""
    model.set_engine("graph")
    answered = model.from_graph

    def or_nothing(ids: Tensor, *others: Tensor | None, **how: Any) -> ExitOutput:
        out = answered(ids, *others, **how)
        if out is None:
            raise NotMeasuredError("; ".join(sorted(model._said_of_engine)))
        return out

    model.from_graph = or_nothing


#: Engine -> how a converted model is told to use it.
ENGINES: dict[str, Callable[[Model], None]] = {
    FAMILY_LAYERS: functools.partial(_eager, layers="family"),
    FUSED_LAYERS: functools.partial(_eager, layers="fused"),
    GRAPH: _graph,
}


@functools.cache
def engine_model(subject: Subject, engine: str, backend: str = "auto", *, family: bool = False) -> Model:
    """The early-exit model of a subject under an engine and a back-end, a module of its own on the same parameters.

    Args:
        subject: whose.
        engine: a name of `ENGINES`.
        backend: of the ops.
        family: with exits whose last one is the plain model's head.

    Raises:
        NotMeasuredError: the back-end or the layers can't run here.
    """
    source = subject.family if family else subject.model
    model = copy.deepcopy(source, {id(x): x for x in [*source.parameters(), *source.buffers()]})
    try:
        ENGINES[engine](model)
        model.set_backend(backend)
    except BackendUnavailableError as error:
        raise NotMeasuredError(str(error)) from error
    return model
