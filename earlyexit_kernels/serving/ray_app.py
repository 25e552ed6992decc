"""The server as replicas of Ray Serve: ``serve run earlyexit_kernels.serving.ray_app:app model=/models/out``.

Requires the extras `serve` and `ray`. Each replica is an application of `create_app` with a queue of its own. Ray Serve
speaks HTTP, gives each request to a replica, and starts, replaces and ends replicas.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_type_hints

from pydantic import ConfigDict, create_model
from ray import serve

from earlyexit_kernels.serving.server import Options, api_key, create_app
from earlyexit_kernels.serving.source import Source

#: Fields of `Options` that are arguments of `app`.
LIMITS = "max_length max_tokens max_wait_ms max_queue max_inputs max_body_bytes".split()
_TYPES, _DEFAULTS = get_type_hints(Options), {field.name: field.default for field in fields(Options)}
_FIELDS: dict[str, Any] = {"model": (str, ...), **{name: (_TYPES[name], _DEFAULTS[name]) for name in LIMITS}}
_Arguments: Any = create_model("Arguments", __config__=ConfigDict(extra="forbid"), **_FIELDS)


class Replica:
    """A replica, whose methods are those that Ray Serve calls."""

    def __init__(self, options: Options) -> None:
        self._app = create_app(options)

    def __serve_build_asgi_app__(self) -> Any:
        return self._app


def app(arguments: dict[str, Any]) -> Any:
    """Return the application of Ray Serve; its options, as the number of replicas, are those of a config of `serve`.

    Args:
        arguments: ``"model"``, the folder of the model, which is on every machine, and `LIMITS`, also as text.

    Raises:
        pydantic.ValidationError: an unknown or missing argument, or one of a wrong kind.
    """
    given = _Arguments(**arguments)
    limits = given.model_dump(exclude={"model"})
    options = Options(source=Source.of(given.model, None), api_key=api_key(), **limits)
    deployment = serve.deployment(name="earlyexit", max_ongoing_requests=options.max_queue)
    return deployment(serve.ingress()(Replica)).bind(options)
