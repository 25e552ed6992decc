"""A process that runs sections by name: reads a line for each; writes a line for each record and one for its end.

After an error the process ends and the driver starts another, since a failed kernel leaves the GPU in an unknown state.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from typing import Any, TextIO

import torch

from benchmarks.end_to_end.engines import engine_model
from benchmarks.gpu.bench import Bench, header
from benchmarks.gpu.sections import SECTIONS
from benchmarks.machine import NotMeasuredError, first_line


def work() -> None:
    """Serve until the input ends."""
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints goes to stderr
    for line in sys.stdin:
        if not run(line.strip(), reply):
            return


def run(name: str, reply: TextIO) -> bool:
    """Run a section; return whether the process can run another."""

    def send(**message: Any) -> None:
        print(json.dumps(message), file=reply, flush=True)

    failed, fit = "", False
    try:
        try:
            for record in SECTIONS[name].records(Bench.here()):
                send(record=record)
        except NotMeasuredError as error:
            send(record=header(f"gpu_{name}", name, "everything") | {"not_measured": str(error)})
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        fit = _cleaned()
    except Exception as error:
        traceback.print_exc()
        failed = first_line(error)
    send(end=failed, fit=fit)
    return fit


def _cleaned() -> bool:
    """Free the section's memory; return whether the allocator still works."""
    try:
        engine_model.cache_clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    except RuntimeError:
        traceback.print_exc()
        return False
    return True


if __name__ == "__main__":
    work()
