"""Start the servers that are compared, each as a process of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

import earlyexit_kernels as ee

#: The same weights, of which no row leaves early; the model with its criterion; that behind LitServe.
FULL, OWN, LITSERVE = "full depth", "own exits", "own exits, LitServe"
START_SECONDS, END_SECONDS = 120.0, 40.0
#: Rows of a batch of LitServe, about as many as the default tokens of `earlyexit serve` are.
LARGEST = 64


@contextlib.contextmanager
def serving(name: str, model: Path, work: Path) -> Iterator[str]:
    """Run one of the servers while the block runs, and give its URL.

    Args:
        name: `FULL`, `OWN` or `LITSERVE`.
        model: folder of a model with a criterion.
        work: folder for the copy without a criterion.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    folder = full_depth_copy(model, work) if name == FULL else model
    ours = ["-m", "earlyexit_kernels", "serve", str(folder), "--port", port]
    other = ["-m", "benchmarks.http.litserve_server", str(folder), "--port", port, "--largest", str(LARGEST)]
    command = [sys.executable, *(other if name == LITSERVE else ours)]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, start_new_session=True, **quiet) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(url, process)
            yield url
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # LitServe leaves processes


def full_depth_copy(model: Path, work: Path) -> Path:
    """Return a folder with the same model without a criterion."""
    folder = work / "full_depth"
    if not folder.is_dir():
        shutil.copytree(model, folder)
        full = ee.EarlyExitForSequenceClassification.from_pretrained(folder)
        full.set_criterion(None)
        full.save_pretrained(folder)
    return folder


def _wait(url: str, process: subprocess.Popen) -> None:
    """Wait until a server has answered a text.

    Raises:
        RuntimeError: it ended, or has not answered in time.
    """
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.post(f"{url}/predict", json={"inputs": "a"}, timeout=START_SECONDS).status_code == 200:
                return
        time.sleep(0.2)
    state = "is silent" if process.poll() is None else f"ended with exit code {process.returncode}"
    raise RuntimeError(f"{process.args}: expected an answer within {START_SECONDS:g} s, the process {state}")
