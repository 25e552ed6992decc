"""Worker processes: each runs blocks of cases, and the parent learns which case one has died or hung in."""

from __future__ import annotations

import dataclasses
import faulthandler
import gc
import multiprocessing
import os
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fuzz.case import AcceptedError, Case, WrongError
from fuzz.targets import Target

CONTEXT: Any = multiprocessing.get_context("fork")
#: What stands in the memory that a worker shares with its parent.
NUMBER, STARTED, CALLS = range(3)
MESSAGE = 2000


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one case has shown.

    Attributes:
        kind: ``"wrong"``, ``"crash"``, ``"traceback"`` or ``"accepted"``.
    """

    target: str
    number: int
    kind: str
    message: str


@dataclasses.dataclass(frozen=True)
class Block:
    """Cases `start` to `stop` of a target, or as many of them as a worker runs until a monotonic time."""

    target: str
    start: int
    stop: int
    until: float


@dataclasses.dataclass(frozen=True)
class Done:
    """What became of a block: the number of the first case that was not run, calls and seconds."""

    reached: int
    calls: int
    seconds: float


class Worker:
    """The parent's side of one worker process.

    Args:
        runs: target -> its loaded function ``run(case)``.
        targets: the entries of these targets.
        seed: of the cases.
        log: file for what the process prints; faults of the interpreter are printed there too.
    """

    def __init__(
        self, runs: Mapping[str, Callable[[Case], Any]], targets: Mapping[str, Target], seed: int, log: Path
    ) -> None:
        self.targets = targets
        self.log = log
        self.block: Block | None = None
        self.shared = CONTEXT.RawArray("d", 3)
        self.pipe, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=_serve, args=(theirs, self.shared, runs, targets, seed, log), daemon=True)
        self.process.start()
        theirs.close()

    def give(self, block: Block) -> None:
        """Let the worker run a block."""
        self.block = block
        self.shared[NUMBER], self.shared[STARTED], self.shared[CALLS] = block.start, time.monotonic(), 0
        self.pipe.send(block)

    def received(self) -> list[Finding | Done]:
        """What the worker has sent since the last call."""
        found = []
        try:
            while self.pipe.poll():
                found.append(self.pipe.recv())
        except (EOFError, ConnectionResetError):
            pass  # it has died: `crash` tells
        return found

    def crash(self) -> tuple[Finding, Done] | None:
        """The finding and the outcome of the block where the worker has died or hangs, else None."""
        assert self.block is not None
        elapsed = time.monotonic() - self.shared[STARTED]
        limit = self.targets[self.block.target].limit
        if self.process.is_alive() and elapsed < limit:
            return None
        hangs = self.process.is_alive()
        self.stop()
        code = self.process.exitcode or 0
        how = f"no answer within {limit:g} s" if hangs else f"the process ended with {_name_of(code)}"
        number = int(self.shared[NUMBER])
        finding = Finding(self.block.target, number, "crash", f"{how}{_tail(self.log)}"[:MESSAGE])
        return finding, Done(number + 1, int(self.shared[CALLS]), elapsed)

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _name_of(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit status {code}"


#: How a fault of the interpreter, or the report of a sanitizer, begins.
REPORTS = ("Fatal Python error", "runtime error:", "ERROR: AddressSanitizer")


def _tail(log: Path) -> str:
    """The first lines of a report, or else the last lines that the process has printed."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    found = [k for k, line in enumerate(lines) if any(report in line for report in REPORTS)]
    told = lines[found[0] : found[0] + 12] if found else lines[-12:]
    return "".join(f"\n    {line[:200]}" for line in told if line.strip())


def outcome_of(run: Callable[[Case], Any], case: Case) -> tuple[str, str] | None:
    """Run one case: kind and message of what it found, or None."""
    try:
        run(case)
    except WrongError as error:
        return "wrong", str(error)[:MESSAGE]
    except AcceptedError as error:
        return "accepted", str(error)[:MESSAGE]
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if "earlyexit_kernels" in f.filename]
        where = f" (raised below {ours[-1]})" if ours else f" (raised at {frames[-1].filename}:{frames[-1].lineno})"
        return "traceback", f"{type(error).__name__}: {error}{where}"[:MESSAGE]
    return None


def limit_memory(extra: int | None) -> None:
    """Let this process allocate `extra` bytes more than it has now; None lifts the limit."""
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    if extra is None or "ASAN_OPTIONS" in os.environ:  # the shadow memory of a sanitizer counts too
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
        return
    found = re.search(r"VmData:\s*(\d+)", Path("/proc/self/status").read_text())
    resource.setrlimit(resource.RLIMIT_DATA, ((int(found[1]) << 10) + extra if found else hard, hard))


def _serve(
    pipe: Any,
    shared: Any,
    runs: Mapping[str, Callable[[Case], Any]],
    targets: Mapping[str, Target],
    seed: int,
    log: Path,
) -> None:
    """Run the blocks that come through the pipe, until the parent goes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.freeze()  # what the parent has made stays, and its pages stay shared
    log.unlink(missing_ok=True)
    with log.open("a") as file:  # what is written after it was emptied begins at its start
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        faulthandler.enable(file=sys.__stderr__)
        while True:
            try:
                block = pipe.recv()
            except EOFError:
                return
            os.ftruncate(1, 0)
            limit_memory(targets[block.target].memory)
            pipe.send(_run_block(pipe, shared, runs[block.target], block, seed))
            gc.collect()


def _run_block(pipe: Any, shared: Any, run: Callable[[Case], Any], block: Block, seed: int) -> Done:
    began = time.monotonic()
    number = block.start
    while number < block.stop and time.monotonic() < block.until:
        shared[NUMBER], shared[STARTED] = number, time.monotonic()
        case = Case(block.target, seed, number)
        found = outcome_of(run, case)
        shared[CALLS] += case.calls
        if found is not None:
            pipe.send(Finding(block.target, number, *found))
        number += 1
    return Done(number, int(shared[CALLS]), time.monotonic() - began)
