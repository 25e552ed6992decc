"""The server as replicas of Ray Serve: ``serve run earlyexit_kernels.serving.ray_app:app model=/models/out``.

Requires the extras `serve` and `ray`. Each replica is an application of `create_app` with a queue of its own. Ray Serve
speaks HTTP, gives each request to a replica, and starts, replaces and ends replicas.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict
from ray import serve

from earlyexit_kernels.serving.server import Options, api_key, create_app
from earlyexit_kernels.serving.source import Source


class Arguments(BaseModel):
    """Arguments of `app`: the folder of the model, which is on every machine, and fields of `Options`."""

    model_config = ConfigDict(extra="forbid")

    model: str
    max_length: int | None = None
    max_tokens: int = 2048
    max_wait_ms: float = 5000.0
    max_queue: int = 4096
    max_inputs: int = 256
    max_body_bytes: int = 2**20


class Replica:
    """A replica, whose methods are those that Ray Serve calls."""

    def __init__(self, options: Options) -> None:
        self._app = create_app(options)

    def __serve_build_asgi_app__(self) -> Any:
        return self._app


def app(arguments: Arguments) -> Any:
    """Return the application of Ray Serve; its options, as the number of replicas, are those of a config of `serve`."""
    limits = arguments.model_dump(exclude={"model"})
    options = Options(source=Source.of(arguments.model, None), api_key=api_key(), **limits)
    deployment = serve.deployment(name="earlyexit", max_ongoing_requests=options.max_queue)
    return deployment(serve.ingress()(Replica)).bind(options)
