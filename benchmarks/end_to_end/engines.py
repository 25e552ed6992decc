"""Our engines: converted models, by the kind of their encoder layers."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

from benchmarks.end_to_end.models import Model, Subject
from benchmarks.machine import NotMeasuredError
from earlyexit_kernels.errors import BackendUnavailableError

FAMILY_LAYERS, FUSED_LAYERS, CAPTURED_LAYERS = "family layers", "fused layers", "captured layers"


def _layers(kind: str) -> Callable[[Model], None]:
    return lambda model: model.configure(path=kind)


#: Engine -> function that sets it on a converted model.
ENGINES: dict[str, Callable[[Model], None]] = {
    FAMILY_LAYERS: _layers("eager"),
    FUSED_LAYERS: _layers("fused"),
    CAPTURED_LAYERS: _layers("captured"),
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
        model.configure(backend=backend)
    except BackendUnavailableError as error:
        raise NotMeasuredError(str(error)) from error
    return model


def refused_captures(model: Model) -> str:
    """Return why layers of a model were not captured, ``""`` if all were."""
    captured = model.runner.paths["captured"].layers
    return "; ".join(sorted(captured._logged))
