"""The first and last thing that a request meets: its API key and rate are checked, its status and time counted."""

from __future__ import annotations

import time
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from earlyexit_kernels.serving.http.guard import RateLimit, check_key, check_rate
from earlyexit_kernels.serving.http.metrics import Metrics
from earlyexit_kernels.serving.http.requests import RefusedError
from earlyexit_kernels.serving.http.settings import Settings

#: Paths that are counted by name; all others are counted together.
COUNTED = ("/", "/health", "/info", "/metrics", "/metrics.json", "/openapi.json", "/predict")
#: Paths without an API key: they tell nothing of the model or its texts.
OPEN = ("/", "/health")
#: Status of requests whose client has gone before the answer, as nginx counts them.
GONE = 499


class Door:
    """ASGI middleware that checks the API key, and of `/predict` the rate of the client, and counts every request.

    Args:
        app: the application.
        settings: of the server.
        metrics: where requests are counted.
    """

    def __init__(self, app: Any, *, settings: Settings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._rate = None if settings.rate_limit is None else RateLimit(settings.rate_limit)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), GONE

        async def counted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        path = scope["path"]
        try:
            self._check(path, scope)
        except RefusedError as error:
            await refusal(error)(scope, receive, counted)
        else:
            try:
                await self._app(scope, receive, counted)
            except Exception:
                status = 500  # the handler of errors lies outside
                raise
        finally:
            self._metrics.request(path if path in COUNTED else "other", status, time.monotonic() - started)

    def _check(self, path: str, scope: Any) -> None:
        if path not in OPEN:
            check_key(self._settings.api_key, Request(scope).headers.get("authorization"))
        if path == "/predict":
            check_rate(self._rate, scope["client"][0] if scope["client"] else "")


def refusal(error: RefusedError) -> Response:
    """Return the answer to a refused request."""
    return JSONResponse({"error": str(error), "error_type": error.kind}, error.status, headers=error.headers)
