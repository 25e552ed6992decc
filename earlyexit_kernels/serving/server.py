"""The HTTP interface of a model: a FastAPI application that runs it in a thread."""

from __future__ import annotations

import asyncio
import importlib
import json
import math
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from jinja2 import Environment, PackageLoader, select_autoescape
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect

from earlyexit_kernels.arguments import check_fields, number, optional, whole
from earlyexit_kernels.criteria import from_dict
from earlyexit_kernels.hf.model import EarlyExitForSequenceClassification
from earlyexit_kernels.page_style import COMMON
from earlyexit_kernels.serving.batcher import INVALID, LATE, Answer, Batcher, NoAnswer, QueueFullError
from earlyexit_kernels.serving.drift import drift_of
from earlyexit_kernels.serving.metrics import Metrics
from earlyexit_kernels.serving.requests import (
    RETRY_AFTER,
    Body,
    Encoder,
    PredictRequest,
    RefusedError,
    RerankRequest,
    body_of,
    check_key,
)
from earlyexit_kernels.serving.source import Source, check_tokenizer, checked_model, length_limit
from earlyexit_kernels.tuning.record import Calibration

#: Environment variable with the API key.
KEY_VARIABLE = "EARLYEXIT_API_KEY"
#: Packages whose versions `/info` reports.
REPORTED = ("earlyexit_kernels", "torch", "transformers", "fastapi", "uvicorn")
NDJSON = "application/x-ndjson"
#: Paths that are counted by name; all others are counted together.
COUNTED = ("/", "/health", "/info", "/metrics", "/openapi.json", "/predict", "/rerank")
#: Status of requests whose client has gone before the answer, as nginx counts them.
GONE = 499
#: The status page loads nothing and runs nothing.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'self'",
    "Cache-Control": "no-store",
}
#: Number at the top of the status page -> its name, and how it is written.
TILES: dict[str, tuple[str, Callable[[dict[str, Any], Options], str]]] = {
    "workers": ("workers ready", lambda now, options: f"{now['ready']} of {options.workers}"),
    "restarts": ("workers replaced", lambda now, options: f"{max(0, now['starts'] - options.workers)}"),
    "requests": ("requests", lambda now, _: f"{now['requests']}"),
    "refused": ("refused", lambda now, _: f"{now['refused']}"),
    "rate": ("inputs a second", lambda now, _: f"{now['rate']:.1f}"),
    "queue": ("inputs waiting", lambda now, _: f"{now['queue_rows']}"),
    "median": ("median, ms", lambda now, _: _fixed(now["p50"])),
    "slowest": ("99 % below, ms", lambda now, _: _fixed(now["p99"])),
    "mean": ("mean exit layer", lambda now, _: f"{_fixed(now['mean_layer'], 2)} of {len(now['layers'])}"),
}
#: Rows after which their exit layers are compared with those of the calibration.
DRIFT_WINDOW = 1000
#: Seconds for which a thread may keep others from running Python: the model's must not keep requests waiting.
SWITCH_SECONDS = 0.001


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a server serves, and its limits.

    Attributes:
        source: of the model; a worker that is replaced loads it again, and fails where it has been saved again.
        modules: to import first, which register criteria or model families of the user.
        host, port: address; port 0 is any free one.
        workers: processes with a copy of the model each.
        max_length: tokens of a row, or None for all that the model takes.
        max_tokens: tokens of a batch; a longer row gets one of its own.
        max_wait_ms: milliseconds that a row may wait before its batch begins.
        max_queue: rows that may wait in each worker.
        max_inputs: texts of a request.
        max_body_bytes: size of a request.
        api_key: that clients must send, or None.
        stall_seconds: time without an answer after which a batch has stalled, and its worker is replaced.
    """

    source: Source
    modules: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    max_length: int | None = None
    max_tokens: int = 2048
    max_wait_ms: float = 5000.0
    max_queue: int = 4096
    max_inputs: int = 256
    max_body_bytes: int = 2**20
    api_key: str | None = field(default=None, repr=False)
    stall_seconds: float = 120.0

    def __post_init__(self) -> None:
        positive, count = number(low=0, inside=True), whole(low=1)
        counts = dict.fromkeys(("workers", "max_tokens", "max_queue", "max_inputs", "max_body_bytes"), count)
        others = {"port": whole(low=0, high=65535), "max_length": optional(count), "max_wait_ms": positive}
        check_fields(self, {**counts, **others, "stall_seconds": positive})
        if self.max_inputs > self.max_queue:
            raise ValueError(
                f"--max-inputs: expected at most --max-queue = {self.max_queue}, got {self.max_inputs}; a "
                "request with more texts than may wait could never be answered"
            )

    def public(self) -> dict[str, Any]:
        """Return the limits that clients may know."""
        names = "workers max_tokens max_wait_ms max_queue max_inputs max_body_bytes".split()
        return {name: getattr(self, name) for name in names}


def api_key() -> str | None:
    """Return the API key in the environment, or None.

    Raises:
        ValueError: the key is empty or not plain ASCII.
    """
    key = os.environ.get(KEY_VARIABLE)
    if key is None:
        return None
    key = key.strip()
    if not key or not key.isascii() or len(key.split()) > 1:
        raise ValueError(f"{KEY_VARIABLE}: expected a key of ASCII characters without spaces")
    return key


def create_app(options: Options) -> FastAPI:
    """Load the model, and return an application that answers requests by it; see docs/serving.md.

    Raises:
        ImportError: a module of the options cannot be imported.
        OSError: a file of the model is missing.
        RuntimeError: the model has been saved again since the options were made.
        ValueError: the model or its tokenizer cannot be loaded.
    """
    for module in options.modules:
        importlib.import_module(module)
    batcher = Batcher(
        partial(_loaded, options.source),
        max_tokens=options.max_tokens,
        max_rows=options.max_queue,
        max_wait=options.max_wait_ms / 1000,
        threads=max(1, len(os.sched_getaffinity(0)) // options.workers),
        stall_seconds=options.stall_seconds,
    )
    model = batcher.model
    longest = length_limit(None, batcher.tokenizer, model)
    encoder = Encoder(batcher.tokenizer, min(options.max_length or longest, longest))
    counts = Metrics(model.depth, drift_of(model, DRIFT_WINDOW))
    batcher.count, batcher.queued = counts.count, counts.queued
    sys.setswitchinterval(SWITCH_SECONDS)
    about = {"model": options.source.title, **_described(model), "max_length": encoder.max_length}
    return _application(options, Answers(options, batcher, encoder), counts, about)


def _loaded(source: Source) -> tuple[EarlyExitForSequenceClassification, Any]:
    found, tokenizer = source.load()
    model = checked_model(found)
    check_tokenizer(tokenizer, model)
    model.config.strict = False  # rows with invalid logits fail alone; strict fails their whole batch
    return model.eval(), tokenizer


def _described(model: EarlyExitForSequenceClassification) -> dict[str, Any]:
    """Return what clients may know of a model, JSON-ready."""
    config: Any = model.config
    calibration = Calibration.of(model)
    about = None if calibration is None else calibration.to_dict()
    return {
        "model_type": config.backbone_config.model_type,
        "method": model.method.to_dict(),
        "problem_type": model.problem_type,
        "labels": [config.id2label[index] for index in range(config.num_labels)],
        "depth": model.depth,
        "criterion": model.view().criterion.to_dict(),
        "calibration": about and {name: value for name, value in about.items() if name != "curve"},
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "layers": model.explain().path,
        "versions": {name: _version(name) for name in REPORTED},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a checkout that is not installed
        return "not installed"


def _schema(body: type[Body]) -> dict[str, Any]:
    """Return what the OpenAPI schema says of the body of a request."""
    content = {"application/json": {"schema": body.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}


def _application(options: Options, answers: Answers, counts: Metrics, about: dict[str, Any]) -> FastAPI:
    app = FastAPI(
        title="earlyexit",
        version=_version("earlyexit_kernels"),
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    app.add_middleware(Door, key=options.api_key, counts=counts)
    templates = Environment(loader=PackageLoader("earlyexit_kernels.serving", "."), autoescape=select_autoescape())
    page = templates.get_template("status.html.j2")

    @app.post("/predict", openapi_extra=_schema(PredictRequest))
    async def classify(request: Request) -> Response:
        """Classify one input or several; as `application/x-ndjson`, a line for each as soon as it is final."""
        return await answers.predict(request)

    @app.post("/rerank", openapi_extra=_schema(RerankRequest))
    async def rank(request: Request) -> Response:
        """Score the pair of a query and each text, and return the texts by score, the highest first."""
        return await answers.rerank(request)

    @app.get("/health")
    async def health() -> Response:
        """Answer 200: a worker that answers has loaded the model."""
        return JSONResponse({"ready": True})

    @app.get("/info")
    async def info() -> Response:
        """Describe the model, the limits and the versions."""
        return JSONResponse({**about, "limits": options.public()})

    @app.get("/metrics")
    def prometheus() -> Response:
        """Give the metrics of all workers to Prometheus."""
        return Response(counts.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/")
    def status() -> Response:
        """Show the status page."""
        now = counts.numbers()
        tiles = [(name, text, show(now, options)) for name, (text, show) in TILES.items()]
        shown = {"model": about["model"], "criterion": from_dict(about["criterion"]), "workers": options.workers}
        return HTMLResponse(page.render(now=now, tiles=tiles, style=COMMON, **shown), headers=PAGE_HEADERS)

    _add_error_handlers(app)
    return app


def _add_error_handlers(app: FastAPI) -> None:
    """Answer every error in the form of `RefusedError`."""

    @app.exception_handler(RefusedError)
    async def refused(_: Request, error: RefusedError) -> Response:
        return error.response()

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def no_route(_: Request, error: Any) -> Response:
        return RefusedError(error.status_code, "Validation", str(error.detail)).response()

    @app.exception_handler(ClientDisconnect)
    async def left(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=GONE)  # for the count; nobody receives it

    @app.exception_handler(Exception)
    async def broken(_: Request, __: Exception) -> Response:
        return RefusedError(500, "Backend", "the server failed on this request; its log has the error").response()


def _fixed(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


class Door:
    """ASGI middleware that checks the API key, except of `/health`, and counts requests by status and time."""

    def __init__(self, app: Any, *, key: str | None, counts: Metrics) -> None:
        self._app, self._key, self._counts = app, key, counts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status, path = time.monotonic(), GONE, scope["path"]

        async def counted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if path != "/health":
                check_key(self._key, Headers(scope=scope).get("authorization", ""))
            await self._app(scope, receive, counted)
        except RefusedError as error:
            await error.response()(scope, receive, counted)
        except Exception:
            status = 500  # the handler of errors lies outside
            raise
        finally:
            self._counts.request(path if path in COUNTED else "other", status, time.monotonic() - started)


class Answers:
    """Answers requests of `/predict` and `/rerank`.

    Args:
        options: of the server.
        batcher: runs the model.
        encoder: of the model; it runs in a thread, since a long text takes as long as many short requests.
    """

    def __init__(self, options: Options, batcher: Batcher, encoder: Encoder) -> None:
        self._options, self._batcher, self._encoder = options, batcher, encoder
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        labels: Any = batcher.model.config.id2label
        self._labels = [labels[index] for index in range(len(labels))]

    async def predict(self, request: Request) -> Response:
        """Return the answer to a request of `/predict`.

        Raises:
            RefusedError: the request is invalid, or the server overloaded.
            ClientDisconnect: the client has closed the connection; its rows that had not begun are dropped.
        """
        asked = PredictRequest.parse(await body_of(request, self._options.max_body_bytes))
        futures = await self._begun(asked.items(self._options.max_inputs), "inputs", truncate=asked.truncate)
        shown = partial(self._shown, raw_scores=asked.raw_scores)
        if NDJSON in request.headers.get("accept", ""):
            return StreamingResponse(_lines(futures, shown), media_type=NDJSON)
        answers = _checked([shown(answer) for answer in await _unless_gone(request, futures)])
        body = [_error(answer) if isinstance(answer, NoAnswer) else answer for answer in answers]
        return JSONResponse(body[0] if isinstance(asked.inputs, str) else body)

    async def rerank(self, request: Request) -> Response:
        """Return the answer to a request of `/rerank`: the texts by score, and then those without an answer.

        Raises:
            RefusedError: the request is invalid, the model has several labels, or the server is overloaded.
            ClientDisconnect: as for `predict`.
        """
        asked = RerankRequest.parse(await body_of(request, self._options.max_body_bytes))
        if len(self._labels) > 1:
            text = f"/rerank: expected a model with one label, this one has {len(self._labels)}; use /predict"
            raise RefusedError(422, "Validation", text)
        futures = await self._begun(asked.items(self._options.max_inputs), "texts", truncate=asked.truncate)
        shown = partial(self._shown, raw_scores=asked.raw_scores)
        found: list[dict[str, Any]] = []
        for index, answer in enumerate(_checked([shown(answer) for answer in await _unless_gone(request, futures)])):
            if isinstance(answer, NoAnswer):
                value: dict[str, Any] = _error(answer)
            else:
                value = {name: answer[0][name] for name in ("score", "exit_layer")}
            found.append({"index": index, **value, **({"text": asked.texts[index]} if asked.return_text else {})})
        return JSONResponse(sorted(found, key=lambda one: -one.get("score", -math.inf)))

    async def _begun(
        self, items: Sequence[tuple[str, ...]], field: str, *, truncate: bool
    ) -> Sequence[asyncio.Future[Any]]:
        """Return the answers to come of items in a field of a request.

        Raises:
            RefusedError: an item is invalid, or the server overloaded.
        """
        try:
            self._batcher.check(len(items))
            encode = partial(self._encoder.rows, items, truncate=truncate, field=field)
            rows = await asyncio.get_running_loop().run_in_executor(self._thread, encode)
            return self._batcher.submit(rows)
        except QueueFullError:
            text = "the server is overloaded: its queue is full; send it again later"
            raise RefusedError(503, LATE.kind, text, Retry_After=RETRY_AFTER) from None

    def _shown(self, answer: Answer | NoAnswer, *, raw_scores: bool) -> list[dict[str, Any]] | NoAnswer:
        """Return the score of each label, the highest first, and the exit layer; or why there are none."""
        if isinstance(answer, NoAnswer):
            return answer
        scores = answer.logits if raw_scores else answer.scores
        if not all(map(math.isfinite, scores)):
            return INVALID
        best = sorted(zip(self._labels, scores, strict=True), key=lambda pair: -pair[1])
        return [{"label": label, "score": score, "exit_layer": answer.exit_layer} for label, score in best]


def _checked(answers: list[Any]) -> list[Any]:
    """Return the answers to a request.

    Raises:
        RefusedError: one is too late, or there are none.
    """
    problems = [answer for answer in answers if isinstance(answer, NoAnswer)]
    if LATE in problems:
        raise RefusedError(LATE.status, LATE.kind, LATE.text, Retry_After=RETRY_AFTER)
    if len(problems) == len(answers):
        raise RefusedError(*problems[0])
    return answers


def _error(answer: NoAnswer) -> dict[str, str]:
    return {"error": answer.text, "error_type": answer.kind}


async def _unless_gone(request: Request, futures: Sequence[asyncio.Future[Any]]) -> list[Any]:
    """Return what futures get; cancel them where the client of the request goes before.

    Raises:
        ClientDisconnect: it has gone.
    """
    everything = asyncio.gather(*futures)
    gone = asyncio.ensure_future(request.receive())  # the body has been read: the next message is the end
    try:
        await asyncio.wait((everything, gone), return_when=asyncio.FIRST_COMPLETED)
        if not everything.done():
            raise ClientDisconnect
        return everything.result()
    finally:
        gone.cancel()
        everything.cancel()


async def _lines(futures: Sequence[asyncio.Future[Any]], shown: Callable[[Any], Any]) -> AsyncIterator[bytes]:
    """Yield a line of JSON for each row, as soon as it is final; cancel the other rows where the client goes."""
    numbers = {future: number for number, future in enumerate(futures)}
    waiting = set(futures)
    try:
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for future in sorted(done, key=numbers.__getitem__):
                answer = shown(future.result())
                rest = _error(answer) if isinstance(answer, NoAnswer) else {"predictions": answer}
                yield json.dumps({"index": numbers[future], **rest}, allow_nan=False).encode() + b"\n"
    finally:
        for future in waiting:
            future.cancel()
