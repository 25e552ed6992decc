"""`earlyexit predict` on many files beside a plain loop: ``python -m benchmarks.run --suite scoring --model out``.

The rows are the texts that the model was trained to report on, those of few words, again and again. A run is killed at
about half of them and started again; every row has to be there once.
"""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

import earlyexit_kernels as ee
from benchmarks.glue import read_split
from benchmarks.harness import Record
from benchmarks.machine import trained_folder

SUITE, ROWS_PER_REPEAT = "scoring", 100_000
#: Words of a row at most; rows of a call of the plain loop; rows of an input file, and of a unit of it.
WORDS, CALL, FILE, UNIT = 10, 4096, 250_000, 50_000
SECONDS = 3600.0


def plain_loop(model: Path, texts: Sequence[str]) -> float:
    """Return the rows a second of a scorer in this process."""
    scorer = ee.Scorer(model, drift_window=None)
    scorer(texts[:CALL])
    start = time.perf_counter()
    for first in range(0, len(texts), CALL):
        scorer(texts[first : first + CALL])
    return len(texts) / (time.perf_counter() - start)


def write_rows(folder: Path, texts: Sequence[str], rows: int) -> None:
    """Write a table of rows with their numbers, in files of `FILE` rows."""
    folder.mkdir()
    endless = itertools.cycle(texts)
    for first in range(0, rows, FILE):
        count = min(FILE, rows - first)
        table = {"id": range(first, first + count), "text": list(itertools.islice(endless, count))}
        pq.write_table(pa.table(table), folder / f"{first:09}.parquet", row_group_size=UNIT)


def command(model: Path, work: Path, name: str) -> list[str]:
    """Return the command that scores the rows in `work` to a folder there."""
    given = [str(model), str(work / "rows"), "--output", str(work / name)]
    return [sys.executable, "-m", "earlyexit_kernels", "predict", *given]


def killed_and_resumed(model: Path, work: Path, rows: int) -> Record:
    """Kill a run when half of its files are there, run it again, and count its rows."""
    scored = work / "resumed"
    running = subprocess.Popen(command(model, work, "resumed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + SECONDS
    while rows_in(scored) < rows / 2:
        if running.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"expected half of the rows in {scored}, the run ended before or took too long")
        time.sleep(0.2)
    running.send_signal(signal.SIGKILL)
    running.wait()
    before = rows_in(scored)
    subprocess.run(command(model, work, "resumed"), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ids = sorted(
        itertools.chain.from_iterable(pq.read_table(path)["id"].to_pylist() for path in scored.glob("*.parquet"))
    )
    return {"rows_before_the_kill": before, "every_row_once": ids == list(range(rows))}


def rows_in(scored: Path) -> int:
    """Return the number of rows in finished files."""
    return sum(pq.read_metadata(path).num_rows for path in scored.glob("*.parquet"))


def records(repeats: int) -> Iterator[Record]:
    """Yield the rows a second of the command and of a loop before and after it, and whether a killed run lost a row.

    Args:
        repeats: 10 for a million rows.
    """
    model, rows = trained_folder(), repeats * ROWS_PER_REPEAT
    texts = [str(text) for text in read_split("sst2", "dev").texts if len(str(text).split()) <= WORDS]
    sample = list(itertools.islice(itertools.cycle(texts), rows // 10))
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_rows(work / "rows", texts, rows)
        before = plain_loop(model, sample)
        start = time.perf_counter()
        subprocess.run(command(model, work, "out"), check=True)
        seconds = time.perf_counter() - start
        after = plain_loop(model, sample)
        yield {
            "suite": SUITE,
            "rows": rows,
            "seconds": round(seconds, 1),
            "rows_per_second": round(rows / seconds, 1),
            "loop_rows_per_second": [round(before, 1), round(after, 1)],
            "ratio": round(2 * rows / seconds / (before + after), 3),
            **killed_and_resumed(model, work, rows),
        }
