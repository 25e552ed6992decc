"""Worker processes, which run blocks of cases; the parent finds out in which case a worker died or hung."""

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
#: Indices of the array that a worker shares with its parent.
NUMBER, STARTED, CALLS = range(3)
MAX_MESSAGE = 2000


@dataclasses.dataclass(frozen=True)
class Finding:
    """Finding of one case.

    Attributes:
        kind: ``"wrong"``, ``"crash"``, ``"traceback"`` or ``"accepted"``.
    """

    target: str
    number: int
    kind: str
    message: str


@dataclasses.dataclass(frozen=True)
class Block:
    """Cases `start` to `stop` of a target, to run until the monotonic time `until`."""

    target: str
    start: int
    stop: int
    until: float


@dataclasses.dataclass(frozen=True)
class Done:
    """Result of a block: number of the first case that was not run, calls and seconds."""

    reached: int
    calls: int
    seconds: float


class Worker:
    """One worker process, as seen by the parent.

    Args:
        runs: target -> its function ``run(case)``.
        targets: name -> target.
        seed: seed of the cases.
        log: file for the output of the process, including faults of the interpreter.
    """

    def __init__(
        self, runs: Mapping[str, Callable[[Case], Any]], targets: Mapping[str, Target], seed: int, log: Path
    ) -> None:
        self.targets = targets
        self.log = log
        self.block: Block | None = None
        self.shared = CONTEXT.RawArray("d", 3)
        self.pipe, child_pipe = CONTEXT.Pipe()
        self.process = CONTEXT.Process(
            target=_serve, args=(child_pipe, self.shared, runs, targets, seed, log), daemon=True
        )
        self.process.start()
        child_pipe.close()

    def give(self, block: Block) -> None:
        """Give the worker a block to run."""
        self.block = block
        self.shared[NUMBER], self.shared[STARTED], self.shared[CALLS] = block.start, time.monotonic(), 0
        self.pipe.send(block)

    def received(self) -> list[Finding | Done]:
        """Return the messages since the last call."""
        messages = []
        try:
            while self.pipe.poll():
                messages.append(self.pipe.recv())
        except (EOFError, ConnectionResetError):
            pass  # it has died, as `crash` reports
        return messages

    def crash(self) -> tuple[Finding, Done] | None:
        """Return a finding and the result of the block if the worker has died or hangs, else None."""
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
        finding = Finding(self.block.target, number, "crash", f"{how}{_tail(self.log)}"[:MAX_MESSAGE])
        return finding, Done(number + 1, int(self.shared[CALLS]), elapsed)

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _name_of(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit status {code}"


#: Beginnings of fault reports of the interpreter and of sanitizers.
REPORTS = ("Fatal Python error", "runtime error:", "ERROR: AddressSanitizer")


def _tail(log: Path) -> str:
    """Return the first lines of a fault report, or else the last lines of the output."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    found = [k for k, line in enumerate(lines) if any(report in line for report in REPORTS)]
    shown = lines[found[0] : found[0] + 12] if found else lines[-12:]
    return "".join(f"\n    {line[:200]}" for line in shown if line.strip())


def finding_of(run: Callable[[Case], Any], case: Case) -> tuple[str, str] | None:
    """Run one case; return the kind and message of its finding, or None."""
    try:
        run(case)
    except WrongError as error:
        return "wrong", str(error)[:MAX_MESSAGE]
    except AcceptedError as error:
        return "accepted", str(error)[:MAX_MESSAGE]
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if "earlyexit_kernels" in f.filename]
        where = f" (raised below {ours[-1]})" if ours else f" (raised at {frames[-1].filename}:{frames[-1].lineno})"
        return "traceback", f"{type(error).__name__}: {error}{where}"[:MAX_MESSAGE]
    return None


def limit_memory(extra: int | None) -> None:
    """Let this process allocate `extra` bytes in addition to its memory; None removes the limit."""
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
    """Run blocks from the pipe until the parent closes it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.freeze()  # objects of the parent are kept, so their pages stay shared
    log.unlink(missing_ok=True)
    with log.open("a") as file:  # in append mode, output starts at the beginning after the file was truncated
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
        found = finding_of(run, case)
        shared[CALLS] += case.calls
        if found is not None:
            pipe.send(Finding(block.target, number, *found))
        number += 1
    return Done(number, int(shared[CALLS]), time.monotonic() - began)
