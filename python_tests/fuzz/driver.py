"""Driver: gives blocks of cases to workers, collects the findings, and continues where the last run ended."""

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

#: Seconds per block.
BLOCK_SECONDS = 4.0
#: Maximum number of findings of a run to keep; all are counted.
MAX_FINDINGS = 2000


@dataclasses.dataclass
class Progress:
    """Progress of a target with one seed, over all runs.

    Attributes:
        next: first case number that was never given to a worker.
        left: ranges of case numbers that were given to a worker and not run.
        cases, calls, seconds: totals over all runs.
    """

    next: int = 0
    left: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    cases: int = 0
    calls: int = 0
    seconds: float = 0.0


class Store:
    """Progress of one seed, stored in a JSON file.

    Args:
        folder: folder of the file.
        seed: seed of the cases.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.path = folder / f"seed-{seed}.json"
        self.targets: dict[str, Progress] = {}
        if self.path.is_file():
            data = json.loads(self.path.read_text())["targets"]
            for name, values in data.items():
                self.targets[name] = Progress(**{**values, "left": [(a, b) for a, b in values["left"]]})

    def of(self, target: str) -> Progress:
        """Return the progress of a target."""
        return self.targets.setdefault(target, Progress())

    def save(self, findings: list[Finding]) -> None:
        """Write the progress and the findings of this run."""
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
    """Cases, calls and seconds of one run by target, and its findings."""

    cases: dict[str, int]
    calls: dict[str, int]
    seconds: dict[str, float]
    findings: list[Finding]
    counted: dict[tuple[str, str], int]

    @staticmethod
    def empty(targets: Mapping[str, Target]) -> Run:
        """Return the state before the first case."""
        zero = dict.fromkeys(targets, 0)
        return Run(dict(zero), dict(zero), dict.fromkeys(targets, 0.0), [], {})

    def add(self, finding: Finding) -> None:
        """Count a finding, and keep it up to `MAX_FINDINGS`."""
        key = finding.target, finding.kind
        self.counted[key] = self.counted.get(key, 0) + 1
        if len(self.findings) < MAX_FINDINGS:
            self.findings.append(finding)


class Driver:
    """Run targets in worker processes.

    Args:
        targets: name -> target.
        seed: seed of the cases.
        workers: number of processes.
        folder: folder for the progress and the logs of the workers.
        max_cases: maximum number of cases per target in this run, or None for no limit.
    """

    def __init__(
        self, targets: Mapping[str, Target], *, seed: int, workers: int, folder: Path, max_cases: int | None = None
    ) -> None:
        self.targets, self.seed, self.folder, self.max_cases = targets, seed, folder, max_cases
        self.store = Store(folder, seed)
        self.run = Run.empty(targets)
        folder.mkdir(parents=True, exist_ok=True)
        self.runs = {name: target.load() for name, target in targets.items()}
        self.workers = [self._worker(k) for k in range(workers)]

    def _worker(self, k: int) -> Worker:
        return Worker(self.runs, self.targets, self.seed, self.folder / f"worker-{k}.log")

    def drive(self, seconds: float) -> Run:
        """Fuzz for this time, or until every target has run its cases; KeyboardInterrupt ends it early."""
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
        """Receive the messages of a worker, replace it if it has died, give it a block; return whether it is busy."""
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
                handed[worker.block.target] += BLOCK_SECONDS
                held[worker.block.target] += worker.block.stop - worker.block.start
        open_ = [t for t in self.targets if self.max_cases is None or self.run.cases[t] + held[t] < self.max_cases]
        if now >= deadline or not open_:
            return None
        target = min(open_, key=lambda t: (self.run.seconds[t] + handed[t]) / self.targets[t].share)
        size = self._size(target)
        if self.max_cases is not None:
            size = min(size, self.max_cases - self.run.cases[target] - held[target])
        start, stop = self._range(target, size)
        return Block(target, start, stop, min(now + BLOCK_SECONDS, deadline))

    def _size(self, target: str) -> int:
        """Return the number of cases for one block, from their speed so far."""
        seconds, cases = self.run.seconds[target], self.run.cases[target]
        return max(1, min(4096, int(BLOCK_SECONDS * cases / seconds))) if cases and seconds else 16

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
    """Read the findings of the last run from a progress file."""
    return json.loads(findings.read_text())["findings"]
