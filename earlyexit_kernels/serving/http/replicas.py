"""The server as replicas of Ray Serve, on this machine or a cluster.

Each replica is a `Service` with its own workers and queue. Ray Serve speaks HTTP, gives each request to a replica that
has room, replaces replicas that end, and starts and ends them as the load asks for.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import Callable
from typing import Any

from earlyexit_kernels.serving.http.server import bound
from earlyexit_kernels.serving.http.service import Service
from earlyexit_kernels.serving.http.settings import Settings
from earlyexit_kernels.serving.ray_session import ray_session

NAME = "earlyexit"
#: Seconds between looks at whether a replica lives.
HEALTH_SECONDS = 2.0
#: Requests under way per replica that Ray Serve aims at where it may choose the number of replicas.
TARGET = 16


class Replica:
    """A replica; its methods are those that Ray Serve calls.

    Args:
        settings: of the server.
    """

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        self._service = Service(settings)
        await self._service.start()

    def __serve_build_asgi_app__(self) -> Any:
        return self._service.app

    async def __del__(self) -> None:
        await self._service.stop()


def run(settings: Settings, replicas: tuple[int, int], address: str | None, started: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT, then answer the requests under way and return.

    Args:
        settings: of each replica; on a cluster the folder of the model is on every machine.
        replicas: the least and the most of them.
        address: of a cluster of Ray; None: this machine.
        started: called with the URL when all of the least number are ready.

    Raises:
        ConnectionError: there is no cluster at the address.
        OSError: the port of this machine is taken, for which Ray Serve would wait.
        ValueError: a replica cannot be started.
    """
    if address is None:
        for one in asyncio.run(bound(settings.host, settings.port)):
            one.close()
    end = threading.Event()
    with ray_session(address):
        import ray
        from ray import serve

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: end.set())
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        logged = {"log_level": "WARNING", "enable_access_log": False}
        serve.start(http_options={"host": settings.host, "port": settings.port}, logging_config=logged)
        try:
            machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            deployment = serve.deployment(serve.ingress()(Replica)).options(**_options(settings, replicas, machines))
            try:
                serve.run(deployment.bind(settings), name=NAME, route_prefix="/", logging_config=logged)
            except RuntimeError as error:
                raise ValueError(f"a replica cannot serve {settings.model}: {_last_line(error)}") from error
            started(f"http://{settings.host}:{settings.port}")
            end.wait()
        finally:
            serve.delete(NAME)
            if address is None:
                serve.shutdown()


def _options(settings: Settings, replicas: tuple[int, int], machines: list[dict[str, float]]) -> dict[str, Any]:
    """Return the options of the deployment: a replica has a GPU, or an equal share of the cores."""
    least, most = replicas
    cores = [int(machine["CPU"]) for machine in machines if machine.get("CPU")]
    share = max(1, min(sum(cores) // most, *cores))
    needs = {"num_cpus": 1, "num_gpus": 1} if any(machine.get("GPU") for machine in machines) else {"num_cpus": share}
    number: dict[str, Any] = {"num_replicas": least}
    if most > least:
        scaling = {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": TARGET}
        number = {"autoscaling_config": scaling}
    return number | {
        "name": NAME,
        "ray_actor_options": needs,
        "max_ongoing_requests": settings.max_queue,
        "health_check_period_s": HEALTH_SECONDS,
        "graceful_shutdown_timeout_s": settings.drain_seconds,
    }


def _last_line(error: Exception) -> str:
    """Return the last line of a message that contains the traceback of a replica."""
    return str(error).strip().splitlines()[-1].strip()
