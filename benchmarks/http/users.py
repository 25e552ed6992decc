"""Locust: so many users, each of whom always has a request under way."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.harness import Record
from benchmarks.http.names import FULL, LITSERVE, OWN
from benchmarks.http.servers import Running, serving

USERS = (1, 16, 64)
#: Clients of the test of many connections; the server's queue holds 4096 texts.
MANY = 1000
SECONDS = 10


def records(model: Path, work: Path, texts: Sequence[str], seconds: int = SECONDS) -> Iterator[Record]:
    """Yield answers a second and latencies of all servers, and of ours with `MANY` users."""
    for users in USERS:
        for name in (FULL, OWN, LITSERVE):
            with serving(name, model, work) as server:
                yield record(name, users, run(server, texts, users, seconds, work))
    with serving(OWN, model, work) as server:
        yield record(OWN, MANY, run(server, texts, MANY, seconds, work)) | {"peak_mib": peak_memory(server.pid)}


def run(server: Running, texts: Sequence[str], users: int, seconds: int, work: Path) -> dict[str, str]:
    """Return locust's statistics of all requests."""
    listed, prefix = work / "texts.txt", work / "locust"
    listed.write_text("\n".join(texts) + "\n", encoding="utf-8")
    file = Path(__file__).with_name("locustfile.py")
    load = ["--headless", "-u", str(users), "-r", str(users), "-t", f"{seconds}s", "--stop-timeout", "60"]
    command = [sys.executable, "-m", "locust", "-f", str(file), *load, "--host", server.url, "--csv", str(prefix)]
    done = subprocess.run([*command, "--only-summary"], env={**os.environ, "TEXTS": str(listed)}, capture_output=True)
    if done.returncode not in (0, 1):  # 1: some requests failed, which the statistics count
        raise RuntimeError(f"locust ended with exit code {done.returncode}: {done.stderr.decode()[-500:]}")
    with prefix.with_name("locust_stats.csv").open(newline="") as stats:
        return next(row for row in csv.DictReader(stats) if row["Name"] == "Aggregated")


def record(server: str, users: int, stats: dict[str, str]) -> Record:
    """Return the record of a run."""
    return {
        "suite": "http",
        "part": "users",
        "server": server,
        "users": users,
        "answers": int(stats["Request Count"]) - int(stats["Failure Count"]),
        "failures": int(stats["Failure Count"]),
        "answers_per_second": round(float(stats["Requests/s"]), 1),
        "p50_ms": float(stats["50%"]),
        "p99_ms": float(stats["99%"]),
    }


def peak_memory(pid: int) -> int:
    """Return the largest memory of the process that speaks HTTP, in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) // 1024
