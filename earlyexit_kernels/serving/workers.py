"""The processes of a server: workers with a copy of the model each, which uvicorn supervises."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import uvicorn
from fastapi import FastAPI
from transformers.utils.logging import disable_progress_bar
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

from earlyexit_kernels.serving.metrics import FOLDER
from earlyexit_kernels.serving.server import Options, create_app

logger = logging.getLogger("earlyexit_kernels")

#: Connections beside those of rows that wait, above which uvicorn answers 503.
CONNECTIONS = 1024
#: Seconds in which a worker must answer the supervisor, which it cannot before torch is imported. Generous, since the
#: end of a worker is noticed at once, and a batch that stalls ends it.
HEALTH_SECONDS = 600
#: Seconds after SIGTERM in which requests under way are answered.
DRAIN_SECONDS = 30


def run(options: Options, started: Callable[[str], None]) -> int:
    """Serve until SIGTERM or SIGINT, then answer the requests under way.

    Args:
        options: of the server.
        started: called with the URL when the first worker listens.

    Returns:
        exit code: 2 where a worker cannot load the model, else 0.

    Raises:
        OSError: the address cannot be bound.
    """
    sockets = asyncio.run(_bound(options.host, options.port))
    host, port = sockets[0].getsockname()[:2]
    config = uvicorn.Config(
        partial(_worker_app, options),
        factory=True,
        workers=options.workers,
        log_config=None,
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        limit_concurrency=options.max_queue + CONNECTIONS,
        timeout_worker_healthcheck=HEALTH_SECONDS,
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    with tempfile.TemporaryDirectory(prefix="earlyexit-metrics-") as folder:
        os.environ[FOLDER] = folder
        supervisor = _Supervisor(config, sockets, partial(started, url))
        supervisor.run()
    return 2 if any(process.exitcode == STARTUP_FAILURE for process in supervisor.processes) else 0


def _worker_app(options: Options) -> FastAPI:
    """Return the application of a worker; end the process, and with it the server, where there is none."""
    disable_progress_bar()
    try:
        return create_app(options)
    except Exception as error:  # transformers raises almost any class for a broken file
        reason = " ".join(str(error).removeprefix("Scorer: ").split()) or type(error).__name__
        print(f"error: a worker cannot serve {options.source.name}: {reason}", file=sys.stderr, flush=True)
        sys.exit(STARTUP_FAILURE)


async def _bound(host: str, port: int) -> list[Any]:
    """Return sockets bound to an address; they listen when a worker has loaded the model.

    Those that uvicorn binds have no protocol number, for which asyncio leaves Nagle's algorithm on: 40 ms a request.

    Raises:
        OSError: the address is taken or unknown.
    """
    try:
        server = await asyncio.get_running_loop().create_server(asyncio.Protocol, host, port, start_serving=False)
    except OSError as error:
        raise OSError(f"--port: cannot listen at {host}:{port} ({error}); choose another port or --host") from error
    sockets = [socket.dup() for socket in server.sockets]
    server.close()
    return sockets


class _Supervisor(Multiprocess):
    """uvicorn's supervisor, which also tells when the first worker listens, and notices at once that one has ended."""

    def __init__(self, config: uvicorn.Config, sockets: list[Any], started: Callable[[], None]) -> None:
        super().__init__(config, sockets)
        self._started: Callable[[], None] | None = started

    def terminate_all(self) -> None:
        """End the workers. New connections are refused: those that wait at an open socket would be reset at the end."""
        for bound in self.sockets:
            bound.close()
        super().terminate_all()

    def keep_subprocess_alive(self) -> None:
        """Replace workers that have ended or do not answer."""
        for process in self.processes:
            process.child_conn.close()  # otherwise the health check of a worker that has ended waits for its time-out
        before = list(self.processes)
        super().keep_subprocess_alive()
        for old, new in zip(before, self.processes, strict=True):
            if new is not old:
                logger.warning(
                    "worker %s has ended with exit code %s; worker %s replaces it", old.pid, old.exitcode, new.pid
                )
        if self._started and any(process.is_ready(HEALTH_SECONDS) for process in self.processes):
            self._started()
            self._started = None
