"""Servers on free ports: one in a thread whose worker needs no torch, and one that is the command line itself."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from earlyexit_kernels.data import toy
from earlyexit_kernels.serving.http import server, worker_process
from earlyexit_kernels.serving.http.settings import Settings

HERE = Path(__file__).parent
#: Generous: the machine may be busy.
SECONDS = 60.0
#: Words that are orders to a fake worker.
ORDERS = {"slow": "opera", "end": "series", "fail": "record", "hang": "novel"}


@contextmanager
def fake_server(folder: Path, **settings: Any) -> Iterator[str]:
    """Run a server with fake workers in a thread, and give its URL.

    Args:
        folder: with a tokenizer.
        settings: of `Settings`.
    """
    ids = {order: toy.vocabulary().index(word) for order, word in ORDERS.items()}
    began: Future[tuple[str, asyncio.AbstractEventLoop, asyncio.Task]] = Future()

    async def main() -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        try:
            await server.serve(
                Settings(model=folder, port=0, **settings), lambda url, _: began.set_result((url, loop, task))
            )
        except asyncio.CancelledError:
            pass
        except BaseException as error:
            began.set_exception(error)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker_process, "WORKER", (str(HERE / "fake_worker.py"), json.dumps(ids)))
        thread = threading.Thread(target=asyncio.run, args=(main(),))
        thread.start()
        url, loop, task = began.result(SECONDS)
        try:
            yield url
        finally:
            loop.call_soon_threadsafe(task.cancel)
            thread.join(SECONDS)
            assert not thread.is_alive()


def fake_workers() -> list[int]:
    """Return the process ids of the fake workers of this process."""
    children = Path("/proc/self/task").glob("*/children")
    pids = [int(one) for file in children for one in file.read_text().split()]
    return [pid for pid in pids if b"fake_worker.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


class Command:
    """`earlyexit serve` as a process, with workers whose model fails on some words; see `faulty_worker`."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        root = HERE.parents[1]
        paths = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, HERE / "faulty_server.py", str(folder), "--port", "0", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        self.url = next((word.rstrip(":") for word in self.line.split() if word.startswith("http://")), "")

    @property
    def workers(self) -> list[int]:
        """Process ids of the workers."""
        pid = self.process.pid
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def end(self) -> tuple[int, str]:
        """Send SIGTERM; return the exit code and what was written to stderr."""
        self.process.send_signal(signal.SIGTERM)
        _, errors = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, errors


def client_of(url: str, **arguments: Any) -> httpx.Client:
    """Return a client that waits long enough for a busy machine."""
    return httpx.Client(base_url=url, timeout=SECONDS, **arguments)
