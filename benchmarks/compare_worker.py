"""The process of `benchmarks.compare` that runs one version: ``python -m benchmarks.compare_worker MiniLM``.

Reads the name of a case on each line, and writes its answers and milliseconds. It uses the package's public names only,
so that it also runs with older versions, whose modules are elsewhere.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import earlyexit_kernels as ee
from benchmarks.end_to_end.forced import rule_for
from benchmarks.end_to_end.models import subject
from benchmarks.end_to_end.workloads import Fixed, Ragged

MIXES = ("never exit", "uniform, 50 %", "long tail, 23 %")
#: Seconds of rest: the other process's threads spin for some milliseconds.
REST = 0.02


def work(name: str) -> None:
    """Serve until the input ends."""
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints goes to stderr
    torch.set_flush_denormal(True)
    with torch.inference_mode():
        found = cases(name)
        package = str(Path(ee.__file__).resolve().parent)
        print(json.dumps({"package": package, "cases": list(found)}), file=reply, flush=True)
        for line in sys.stdin:
            time.sleep(REST)
            start = time.perf_counter_ns()
            out = found[line.strip()]()
            milliseconds = (time.perf_counter_ns() - start) / 1e6
            answers = {"logits": out.logits.flatten().tolist(), "exit_layer": out.exit_layer.tolist()}
            print(json.dumps({"milliseconds": milliseconds} | answers), file=reply, flush=True)


def cases(name: str) -> dict[str, Callable[[], Any]]:
    """Return name -> call that answers one batch."""
    found: dict[str, Callable[[], Any]] = {}
    model = subject(name).model
    for works, mixes in ((Fixed(1, 32), MIXES[:1]), (Fixed(32, 32), MIXES), (Ragged(32), MIXES)):
        (batch,) = works.build(subject(name)).batches
        trace = model.trace(**batch)
        for exits in mixes:
            found[f"{name}, {exits}, {works.name}"] = partial(_run, model, rule_for(exits, trace, trained=False), batch)
    return found


def _run(model: Any, rule: Any, batch: dict[str, Any]) -> Any:
    model.set_criterion(rule)
    return model(**batch)


if __name__ == "__main__":
    work(sys.argv[1])
