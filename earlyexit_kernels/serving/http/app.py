"""The HTTP interface of the server, as a FastAPI application."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response

from earlyexit_kernels.serving.http.door import GONE, Door, refusal
from earlyexit_kernels.serving.http.lines import ClientGoneError
from earlyexit_kernels.serving.http.metrics import Metrics
from earlyexit_kernels.serving.http.pool import Pool
from earlyexit_kernels.serving.http.predict import Predict
from earlyexit_kernels.serving.http.requests import PredictRequest, RefusedError, Tokenizer
from earlyexit_kernels.serving.http.status_page import HEADERS, PAGE

#: Packages whose versions `/info` reports.
REPORTED = ("earlyexit_kernels", "torch", "transformers", "fastapi", "uvicorn")
PREDICT = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": PredictRequest.model_json_schema()}}}
}


def create_app(pool: Pool, tokenizer: Tokenizer, metrics: Metrics) -> FastAPI:
    """Return the application; `pool` is started before the first request.

    Args:
        pool: the workers.
        tokenizer: of the model.
        metrics: counts of the server.
    """
    settings = pool.settings
    app = FastAPI(
        title="earlyexit",
        version=_version("earlyexit_kernels"),
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    app.add_middleware(Door, settings=settings, metrics=metrics)
    answer = Predict(pool, tokenizer)

    @app.post("/predict", openapi_extra=PREDICT)
    async def predict(request: Request) -> Response:
        """Classify one input or several; as `application/x-ndjson`, a line for each as soon as it is final."""
        return await answer(request)

    @app.get("/health")
    async def health() -> Response:
        """Answer 200 if a worker takes rows, else 503."""
        ready = pool.ready > 0
        body = {"ready": ready, "workers": settings.workers, "workers_ready": pool.ready}
        return JSONResponse(body, 200 if ready else 503)

    @app.get("/info")
    async def info() -> Response:
        """Describe the model, the limits and the versions."""
        calibration = pool.info["calibration"]
        short = None if calibration is None else {k: v for k, v in calibration.items() if k != "curve"}
        about = {"model": settings.model.resolve().name, **pool.info, "calibration": short}
        about |= {"max_length": tokenizer.max_length, "limits": settings.public()}
        return JSONResponse({**about, "versions": {name: _version(name) for name in REPORTED}})

    @app.get("/metrics")
    async def prometheus() -> Response:
        """Give the metrics to Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/metrics.json")
    async def snapshot() -> Response:
        """Give the numbers of the status page."""
        return JSONResponse(metrics.snapshot(pool))

    @app.get("/")
    async def status() -> Response:
        """Show the status page."""
        return HTMLResponse(PAGE, headers=HEADERS)

    _add_handlers(app)
    return app


def _add_handlers(app: FastAPI) -> None:
    """Answer every error in one form, without a traceback."""

    @app.exception_handler(RefusedError)
    async def refused(_: Request, error: RefusedError) -> Response:
        return refusal(error)

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def no_route(_: Request, error: Any) -> Response:
        return refusal(RefusedError(error.status_code, "Validation", str(error.detail)))

    @app.exception_handler(ClientGoneError)
    async def left(_: Request, __: ClientGoneError) -> Response:
        return Response(status_code=GONE)  # for the count; nobody receives it

    @app.exception_handler(Exception)
    async def broken(_: Request, __: Exception) -> Response:
        return refusal(RefusedError(500, "Backend", "the server failed on this request; its log has the error"))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a checkout that is not installed
        return "not installed"
