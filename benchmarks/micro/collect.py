"""The microbenchmarks as records: pytest-benchmark runs them, and what it measured is read from its JSON.

`benchmarks.micro.measure` says how a ratio comes about, and what a percentage of the roofline is.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from json import loads
from pathlib import Path
from typing import Any

import pytest

from benchmarks.micro import measure
from benchmarks.micro.decisions import untimeable
from benchmarks.micro.measure import COMPILED, COPY, EAGER

SUITE = "micro"
FILES = tuple(sorted(Path(__file__).parent.glob("bench_*.py")))
BASELINE = "plain torch chain"
#: Ways that aren't a back-end's -> what runs them.
ENGINES = {EAGER: "eager", COMPILED: "compiled", COPY: "copy"}


def run(rounds: int, *options: str, files: Sequence[Path] = FILES) -> dict[str, Any]:
    """Run microbenchmarks in this process; what pytest-benchmark writes of them.

    Args:
        rounds: timed rounds of each, fewer where they are slow.
        options: more of pytest's, such as ``-k entropy``.
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
                f"microbenchmarks: expected all to run and one at least to be timed, got {pytest.ExitCode(status)!r}; "
                "what went wrong is printed above"
            )
        return loads(path.read_text(encoding="utf-8"))


def records(repeats: int) -> Iterator[dict[str, Any]]:
    """All microbenchmarks, one record for each way of each case; back-ends that can't be timed here say why.

    Args:
        repeats: timed rounds of a way, fewer where it is slow.
    """
    for backend, why_not in untimeable(measure.DEVICE).items():
        if why_not:
            yield {"suite": SUITE, "backend": backend, "device": measure.DEVICE, "not_measured": why_not}
    yield from records_of(run(repeats))


def records_of(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The records in what `run` gave, first what was timed."""
    for found in document["benchmarks"]:
        info, stats = found["extra_info"], found["stats"]
        low, middle, high = info["quantiles_ms"]
        ratio_low, ratio, ratio_high = info["ratio"]
        yield {
            **_named(info),
            "rounds": stats["rounds"],
            "median_ms": middle,
            "low_ms": low,
            "high_ms": high,
            "p90_ms": info["p90_ms"],
            "chain_ms": info["chain_ms"],
            "ratio": ratio,
            "ratio_low": ratio_low,
            "ratio_high": ratio_high,
            "copy_gb_per_s": info["copy_gb_per_s"],
            "roofline_percent": info["roofline_percent"],
            "goal": None,
        }
    for info in document["left_out"]:
        (why,) = {"refused", "not_measured"} & set(info)
        yield {**_named(info), why: info[why]}


def _named(info: Mapping[str, Any]) -> dict[str, Any]:
    """What tells a record from the others."""
    way = info["way"]
    known = ("op", "case", "shape", "way", "device", "calls", "moved_bytes")
    facts = {name: info[name] for name in ("rule", "left", "live") if name in info}
    return {
        "suite": SUITE,
        **{name: info[name] for name in known},
        "case": f"{info['op']} {info['case']}",
        "dtype": "float32",
        "engine": ENGINES.get(way, "eager"),
        "backend": None if way in ENGINES else way,
        "baseline": BASELINE,
        **facts,
    }
