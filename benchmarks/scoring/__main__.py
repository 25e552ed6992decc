"""Measure `earlyexit score` beside a plain loop: ``python -m benchmarks.scoring --model out``.

The rows are the texts that the model was trained to report on, those of few words, again and again. A run is killed at
about half of them and started again; every row has to be there once.
"""

from __future__ import annotations

import argparse
import itertools
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

import earlyexit_kernels as ee
from benchmarks import harness
from benchmarks.harness import Record
from benchmarks.readme import rewrite
from earlyexit_kernels.cli.recipe import Recipe

#: Words of a row at most; rows of a call of the plain loop; rows of an input file.
WORDS, CALL, FILE = 10, 4096, 250_000
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
        pq.write_table(pa.table(table), folder / f"{first:09}.parquet")


def command(model: Path, work: Path, name: str) -> list[str]:
    """Return the command that scores the rows in `work` to a folder there."""
    given = ["--model", str(model), "--input", str(work / "rows"), "--output", str(work / name)]
    return [sys.executable, "-m", "earlyexit_kernels", "score", *given]


def killed_and_resumed(model: Path, work: Path, rows: int) -> Record:
    """Kill a run when half of its files are there, run it again, and count its rows."""
    scored = work / "resumed" / "scored"
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
    ids = sorted(itertools.chain.from_iterable(pq.read_table(path)["id"].to_pylist() for path in scored.iterdir()))
    return {"rows_before_the_kill": before, "every_row_once": ids == list(range(rows))}


def rows_in(scored: Path) -> int:
    """Return the number of rows in finished files."""
    return sum(pq.read_metadata(path).num_rows for path in scored.glob("*.parquet"))


def main() -> None:
    """Measure, and write the results of the suite `scoring`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder that `earlyexit train` and `calibrate` wrote")
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the table (default: %(default)s)")
    parser.add_argument("--loop-rows", type=int, default=100_000, help="rows of the plain loop (default: %(default)s)")
    parser.add_argument("--results", type=Path, help="another folder for the JSON; documents stay then")
    args = parser.parse_args()
    recipe = Recipe.load(args.model)
    texts: list[Any] = [
        one for one in recipe.evaluation_rows(recipe.load_data()).sentences if len(one.split()) <= WORDS
    ]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_rows(work / "rows", texts, args.rows)
        sample = list(itertools.islice(itertools.cycle(texts), args.loop_rows))
        before = plain_loop(args.model, sample)
        start = time.perf_counter()
        subprocess.run(command(args.model, work, "out"), check=True)
        seconds = time.perf_counter() - start
        after = plain_loop(args.model, sample)
        loop = (before + after) / 2
        record = {
            "suite": "scoring",
            "rows": args.rows,
            "seconds": round(seconds, 1),
            "rows_per_second": round(args.rows / seconds, 1),
            "loop_rows_per_second": [round(before, 1), round(after, 1)],
            "ratio": round(args.rows / seconds / loop, 3),
            **killed_and_resumed(args.model, work, args.rows),
        }
    print(record)
    print(f"wrote {harness.save('scoring', [record], results=args.results)}")
    if args.results is None:
        rewrite()


if __name__ == "__main__":
    main()
