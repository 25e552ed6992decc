"""The microbenchmarks as records: pytest-benchmark runs them, and the records are read from its JSON."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import Record
from benchmarks.machine import device
from benchmarks.micro.decisions import untimeable

SUITE = "micro"
FILES = tuple(sorted(Path(__file__).parent.glob("bench_*.py")))


def run(rounds: int, *options: str, files: Sequence[Path] = FILES) -> dict[str, Any]:
    """Run microbenchmarks in this process, and return pytest-benchmark's JSON.

    Args:
        rounds: timed rounds of each, fewer if they are slow.
        options: further options of pytest, such as ``-k entropy``.
        files: to run.

    Raises:
        RuntimeError: a benchmark failed, or none was timed.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "benchmarks.json"
        quiet = ("-q", "--no-header", "--benchmark-quiet", "-p", "no:cacheprovider", "-W", "ignore")
        timing = ("--benchmark-only", f"--benchmark-json={path}", f"--rounds={rounds}")
        status = pytest.main([*map(str, files), *quiet, *timing, *options])
        if status != pytest.ExitCode.OK or not path.exists():
            raise RuntimeError(
                f"microbenchmarks: expected all to run and at least one to be timed, got {pytest.ExitCode(status)!r}; "
                "the error is printed above"
            )
        return json.loads(path.read_text(encoding="utf-8"))


def records(repeats: int) -> Iterator[Record]:
    """Yield a record for each variant of each case, and for each back-end that cannot be timed here."""
    for backend, reason in untimeable(device()).items():
        if reason:
            yield {"suite": SUITE, "backend": backend, "device": device(), "not_measured": reason}
    document = run(repeats)
    yield from (found["extra_info"] for found in document["benchmarks"])
    yield from document["skipped"]
