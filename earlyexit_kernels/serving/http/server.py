"""Run the server until it is told to stop."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable
from typing import Any

import uvicorn

from earlyexit_kernels.serving.http.service import Service
from earlyexit_kernels.serving.http.settings import Settings

#: Connections beside those of rows in the queue, above which uvicorn answers 503.
CONNECTIONS = 1024


def run(settings: Settings, started: Callable[[str, dict[str, Any]], None]) -> None:
    """Serve until SIGTERM or SIGINT, then answer the requests under way and return.

    Args:
        settings: of the server.
        started: called when it listens, with its URL and what the workers say of the model.

    Raises:
        OSError: the address cannot be bound, or the folder has no tokenizer.
        ValueError: the model or the tokenizer cannot be loaded.
    """
    asyncio.run(serve(settings, started))


async def serve(settings: Settings, started: Callable[[str, dict[str, Any]], None]) -> None:
    """Serve as `run` does; outside of the main thread, which receives the signals, until the task is cancelled."""
    service = Service(settings)
    config = uvicorn.Config(
        service.app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        limit_concurrency=settings.max_queue + CONNECTIONS,
        timeout_graceful_shutdown=settings.drain_seconds,  # type: ignore[arg-type]  # asyncio.wait_for takes floats
    )
    sockets = await bound(settings.host, settings.port)
    try:
        await service.start()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, _stopped)
        host, port = sockets[0].getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        await _Server(config, lambda: started(url, service.pool.info)).serve(sockets=sockets)
    finally:
        for socket in sockets:
            socket.close()
        await service.stop()


async def bound(host: str, port: int) -> list[Any]:
    """Return sockets bound to an address, before the model is loaded; they listen when uvicorn starts.

    Those that uvicorn binds have no protocol number, for which asyncio leaves Nagle's algorithm on: 40 ms a request.

    Raises:
        OSError: the address is taken or unknown.
    """
    server = await asyncio.get_running_loop().create_server(asyncio.Protocol, host, port, start_serving=False)
    sockets = [socket.dup() for socket in server.sockets]
    server.close()
    return sockets


class _Server(uvicorn.Server):
    """A server of uvicorn that tells when it listens."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._listening = started

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self._listening()


def _stopped(*_: object) -> None:
    """Do nothing: uvicorn has drained, and raises the signal again for handlers that were there before its own."""
