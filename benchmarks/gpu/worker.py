"""A process that runs sections by name: a line in for each, and out a line for each record and one for its end.

What a GPU is left in by a kernel that failed, no other section shall meet: after an error the process ends, and the
driver starts another.
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
from benchmarks.end_to_end.models import NotMeasuredError
from benchmarks.gpu.bench import Bench, head
from benchmarks.gpu.sections import SECTIONS


def work() -> None:
    """Serve until the input ends."""
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes elsewhere
    for line in sys.stdin:
        if not run(line.strip(), reply):
            return


def run(name: str, reply: TextIO) -> bool:
    """Run a section, and say whether the process is fit for another."""

    def say(**message: Any) -> None:
        print(json.dumps(message), file=reply, flush=True)

    failed, fit = "", False
    try:
        try:
            for record in SECTIONS[name].records(Bench.here()):
                say(record=record)
        except NotMeasuredError as error:
            say(record=head(f"gpu_{name}", name, "everything") | {"not_measured": str(error)})
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        fit = _cleaned()
    except Exception as error:
        traceback.print_exc()
        failed = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    say(end=failed, fit=fit)
    return fit


def _cleaned() -> bool:
    """Drop what the section leaves; False where the allocator is in no state for another."""
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
