"""Measure `earlyexit serve` through HTTP: ``python -m benchmarks.http --model out``.

Needs the extra `serve`, httpx, litserve and locust, and a trained model with a criterion. Clients and server share the
cores of this machine.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from benchmarks import harness
from benchmarks.harness import Record
from benchmarks.http import arrivals, overhead, users
from benchmarks.readme import rewrite
from earlyexit_kernels.cli.recipe import Recipe
from earlyexit_kernels.hf.model import EarlyExitForSequenceClassification

#: Part -> its records, given model, folder for files, and texts.
PARTS: dict[str, Callable[[Path, Path, Sequence[str]], Iterator[Record]]] = {
    "overhead": partial(overhead.records, requests=500),
    "arrivals": arrivals.records,
    "users": users.records,
}


def main() -> None:
    """Measure all parts and write the results of the suite `http`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder that `earlyexit train` and `calibrate` wrote")
    parser.add_argument("--results", type=Path, help="another folder for the JSON; documents stay then")
    args = parser.parse_args()
    recipe = Recipe.load(args.model)
    criterion = EarlyExitForSequenceClassification.from_pretrained(args.model).criterion
    if criterion is None:
        parser.error(
            f"--model: expected a model with a criterion; run earlyexit calibrate --model {args.model} --apply auto"
        )
    texts = list(recipe.evaluation_rows(recipe.load_data()).sentences)
    start, found = time.monotonic(), []
    with tempfile.TemporaryDirectory() as work:
        for measure in PARTS.values():
            for record in measure(args.model, Path(work), texts):
                found.append(record)
                print(" ".join(f"{key}={value}" for key, value in record.items()), flush=True)
    facts = {"seconds": round(time.monotonic() - start), "criterion": str(criterion), "texts": recipe.name}
    print(f"wrote {harness.save('http', found, results=args.results, **facts)}")
    if args.results is None:
        rewrite()


if __name__ == "__main__":
    main()
