"""The driver: hands out blocks of cases in turn, keeps what was found, and goes on where the last run ended."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from multiprocessing import connection
from pathlib import Path
from typing import Any

from fuzz.targets import Target
from fuzz.worker import Block, Done, Finding, Worker

#: Seconds that a worker stays with one target.
TURN = 4.0
#: Findings of a run that are kept; all are counted.
KEPT = 2000


@dataclasses.dataclass
class Progress:
    """How far a target has come with one seed, over all runs.

    Attributes:
        next: the first case number that was never handed out.
        left: ranges of numbers that were handed out and not run.
        cases, calls, seconds: of all runs.
    """

    next: int = 0
    left: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    cases: int = 0
    calls: int = 0
    seconds: float = 0.0


class Store:
    """The progress of one seed in a JSON file.

    Args:
        folder: where it stands.
        seed: of the cases.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.path = folder / f"seed-{seed}.json"
        self.targets: dict[str, Progress] = {}
        if self.path.is_file():
            data = json.loads(self.path.read_text())["targets"]
            for name, values in data.items():
                self.targets[name] = Progress(**{**values, "left": [(a, b) for a, b in values["left"]]})

    def of(self, target: str) -> Progress:
        """The progress of a target."""
        return self.targets.setdefault(target, Progress())

    def save(self, findings: list[Finding]) -> None:
        """Write the progress, and the findings of this run."""
        data = {
            "targets": {name: dataclasses.asdict(progress) for name, progress in self.targets.items()},
            "findings": [dataclasses.asdict(finding) for finding in findings],
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        written = self.path.with_suffix(".part")
        written.write_text(json.dumps(data, indent=1) + "\n")
        written.replace(self.path)


@dataclasses.dataclass
class Run:
    """What one run has done: by target its cases, calls and seconds; and its findings."""

    cases: dict[str, int]
    calls: dict[str, int]
    seconds: dict[str, float]
    findings: list[Finding]
    counted: dict[tuple[str, str], int]

    @staticmethod
    def empty(targets: Mapping[str, Target]) -> Run:
        """Before the first case."""
        zero = dict.fromkeys(targets, 0)
        return Run(dict(zero), dict(zero), dict.fromkeys(targets, 0.0), [], {})

    def add(self, finding: Finding) -> None:
        """Count a finding, and keep it while there are not too many."""
        key = finding.target, finding.kind
        self.counted[key] = self.counted.get(key, 0) + 1
        if len(self.findings) < KEPT:
            self.findings.append(finding)


class Driver:
    """Runs targets in a number of worker processes.

    Args:
        targets: name -> entry.
        seed: of the cases.
        workers: number of processes.
        folder: for the progress and the workers' logs.
        most: cases of each target in this run; None for as many as the time allows.
    """

    def __init__(
        self, targets: Mapping[str, Target], *, seed: int, workers: int, folder: Path, most: int | None = None
    ) -> None:
        self.targets, self.seed, self.folder, self.most = targets, seed, folder, most
        self.store = Store(folder, seed)
        self.run = Run.empty(targets)
        folder.mkdir(parents=True, exist_ok=True)
        self.runs = {name: target.load() for name, target in targets.items()}
        self.workers = [self._worker(k) for k in range(workers)]

    def _worker(self, k: int) -> Worker:
        return Worker(self.runs, self.targets, self.seed, self.folder / f"worker-{k}.log")

    def drive(self, seconds: float) -> Run:
        """Fuzz for so long, or until every target has run its cases; KeyboardInterrupt ends it early."""
        deadline = time.monotonic() + seconds
        saved = time.monotonic()
        try:
            while True:
                busy = [self._attend(k, deadline) for k in range(len(self.workers))]
                if not any(busy):
                    break
                if time.monotonic() - saved > 30:
                    self.store.save(self.run.findings)
                    saved = time.monotonic()
                connection.wait([worker.pipe for worker in self.workers if worker.block is not None], timeout=0.2)
        except KeyboardInterrupt:
            pass
        finally:
            for worker in self.workers:
                worker.stop()
                if worker.block is not None:
                    self.store.of(worker.block.target).left.append((worker.block.start, worker.block.stop))
            self.store.save(self.run.findings)
        return self.run

    def _attend(self, k: int, deadline: float) -> bool:
        """Take what a worker has sent, replace it where it has died, and give it a block; whether it is busy."""
        worker = self.workers[k]
        if worker.block is not None:
            for message in worker.received():
                self._take(worker, message)
        if worker.block is not None and (crashed := worker.crash()) is not None:
            for message in crashed:
                self._take(worker, message)
            worker = self.workers[k] = self._worker(k)
        if worker.block is None and (block := self._next_block(deadline)) is not None:
            worker.give(block)
        return worker.block is not None

    def _take(self, worker: Worker, message: Finding | Done) -> None:
        if isinstance(message, Finding):
            self.run.add(message)
            return
        block = worker.block
        if block is None:
            return
        progress, worker.block = self.store.of(block.target), None
        cases = message.reached - block.start
        if message.reached < block.stop:
            progress.left.append((message.reached, block.stop))
        progress.cases += cases
        progress.calls += message.calls
        progress.seconds += message.seconds
        self.run.cases[block.target] += cases
        self.run.calls[block.target] += message.calls
        self.run.seconds[block.target] += message.seconds

    def _next_block(self, deadline: float) -> Block | None:
        now = time.monotonic()
        handed: dict[str, float] = dict.fromkeys(self.targets, 0)
        held: dict[str, int] = dict.fromkeys(self.targets, 0)
        for worker in self.workers:
            if worker.block is not None:
                handed[worker.block.target] += TURN
                held[worker.block.target] += worker.block.stop - worker.block.start
        open_ = [t for t in self.targets if self.most is None or self.run.cases[t] + held[t] < self.most]
        if now >= deadline or not open_:
            return None
        target = min(open_, key=lambda t: (self.run.seconds[t] + handed[t]) / self.targets[t].share)
        size = self._size(target)
        if self.most is not None:
            size = min(size, self.most - self.run.cases[target] - held[target])
        start, stop = self._range(target, size)
        return Block(target, start, stop, min(now + TURN, deadline))

    def _size(self, target: str) -> int:
        """Cases for one turn, from how fast they were so far."""
        seconds, cases = self.run.seconds[target], self.run.cases[target]
        return max(1, min(4096, int(TURN * cases / seconds))) if cases and seconds else 16

    def _range(self, target: str, size: int) -> tuple[int, int]:
        progress = self.store.of(target)
        if progress.left:
            start, stop = progress.left.pop()
            if stop - start > size:
                progress.left.append((start + size, stop))
            return start, min(stop, start + size)
        progress.next += size
        return progress.next - size, progress.next


def loaded(findings: Path) -> list[dict[str, Any]]:
    """The findings that the last run has left in a progress file."""
    return json.loads(findings.read_text())["findings"]
