"""Ray on this machine, or a cluster of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

#: Bytes of the object store of Ray, through which only messages go.
STORE_BYTES = 128 * 2**20


@contextlib.contextmanager
def ray_session(address: str | None) -> Iterator[None]:
    """Connect to Ray, and start it where there is no address; a session that is there already is used, and left.

    Args:
        address: of a cluster; None: this machine, until the end of the block.

    Raises:
        ConnectionError: there is no cluster at the address, or it refuses this process.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    ours = not ray.is_initialized()
    if ours:
        here: dict[str, Any] = {"num_cpus": len(os.sched_getaffinity(0)), "include_dashboard": False}
        here |= {"object_store_memory": STORE_BYTES}
        try:
            ray.init(address or "local", logging_level="ERROR", log_to_driver=False, **({} if address else here))
        except ConnectionError as error:
            raise ConnectionError(
                f"{error}; expected a running cluster there; one with token authentication, as of Ray 2.59 and later, "
                "needs RAY_AUTH_MODE=token and its token in RAY_AUTH_TOKEN (`ray get-auth-token` on its head)"
            ) from error
    try:
        yield
    finally:
        if ours:
            ray.shutdown()
