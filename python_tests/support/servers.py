"""Servers on free ports: one in a thread of this process, and one that is a process with workers."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from support.faulty_model import FaultySource

from earlyexit_kernels.serving.server import Options, create_app

ROOT = Path(__file__).parents[2]
#: Generous: the machine may be busy.
SECONDS = 240.0


@contextmanager
def thread_server(source: Any = None, **options: Any) -> Iterator[str]:
    """Run a server in a thread, and give its URL.

    Args:
        source: of the model; default: `FaultySource`.
        options: further fields of `Options`.
    """
    app = create_app(Options(source=source or FaultySource(), **options))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, log_level="warning", lifespan="off", access_log=False))
    with socket.create_server(("127.0.0.1", 0)) as bound:
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
        thread.start()
        try:
            yield url
        finally:
            server.should_exit = True
            thread.join(SECONDS)
            assert not thread.is_alive()


class Command:
    """A server as a process; `url` is that of the line that it prints, or empty where it ends without one."""

    def __init__(self, *arguments: str) -> None:
        paths = os.pathsep.join([str(ROOT), str(ROOT / "python_tests"), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
        )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        self.url = next((word.rstrip(":") for word in self.line.split() if word.startswith("http://")), "")

    @property
    def workers(self) -> list[int]:
        """Process ids of the workers; another child is the resource tracker of Python."""
        pid = self.process.pid
        children = [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return [one for one in children if b"spawn_main" in Path(f"/proc/{one}/cmdline").read_bytes()]

    def ended(self) -> tuple[int, str]:
        """Wait for its end; return the exit code and what was written to stderr."""
        _, errors = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, errors

    def kill(self) -> None:
        """End it and its workers, where it has not ended."""
        if self.process.poll() is None:
            pids = self.workers
            self.process.kill()
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            self.process.communicate()


def client_of(url: str, **arguments: Any) -> httpx.Client:
    """Return a client that waits long enough for a busy machine."""
    return httpx.Client(base_url=url, timeout=SECONDS, **arguments)


def counted(client: httpx.Client, name: str, **labels: str) -> float:
    """Return the sum of the samples in `/metrics` that have a name and labels."""
    wanted = {f'{label}="{value}"' for label, value in labels.items()}
    total = 0.0
    for line in client.get("/metrics").text.splitlines():
        sample, _, value = line.rpartition(" ")
        found, _, rest = sample.partition("{")
        if found == f"earlyexit_{name}" and wanted <= set(re.findall(r'\w+="[^"]*"', rest)):
            total += float(value)
    return total


def until(condition: Callable[[], Any]) -> Any:
    """Wait for a condition, and return its value."""
    end = time.monotonic() + SECONDS
    while not (value := condition()):
        assert time.monotonic() < end, "the condition has not become true"
        time.sleep(0.02)
    return value
