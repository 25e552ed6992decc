"""Score the tables of many files with a saved early-exit model, by workers of Ray."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from tqdm import tqdm

from earlyexit_kernels.cli.inputs import check_packages
from earlyexit_kernels.cli.predict import scorer_of, text_columns
from earlyexit_kernels.cli.recipe import Recipe, recipe_of

#: Packages of the extra `ray`.
REQUIRED = ("ray[data]", "pyarrow")


def run(args: argparse.Namespace) -> int:
    """Score the blocks that are not finished; the exit code is 2 if a file cannot be read."""
    check_packages("score", REQUIRED)
    recipe = recipe_of("--model", args.model)
    from earlyexit_kernels.serving.tables.blocks import BLOCK_ROWS, ERRORS, SCORED, Output, model_digest, plan
    from earlyexit_kernels.serving.tables.files import find_files

    columns = tuple(name for name in text_columns(args, recipe) if name is not None)
    files = find_files(args.input)
    blocks, failed = plan(files, columns, BLOCK_ROWS)
    options = _options(args, recipe)
    run = {
        "model": model_digest(args.model),
        "options": {"columns": list(columns), "block_rows": BLOCK_ROWS, **options},
        "inputs": {file.name: [file.size, file.mtime_ns] for file in files},
    }
    output = Output(args.output)
    with output.opened(run, overwrite=args.overwrite):
        left = [block for block in blocks if not output.is_finished(block)]
        to_score = f"{len(left)} of {len(blocks)} blocks of up to {BLOCK_ROWS} rows"
        print(f"{len(files)} file(s), {to_score} to score", file=sys.stderr, flush=True)
        job: dict[str, Any] = {
            "model": os.path.abspath(args.model),
            "output": os.path.abspath(args.output),
            "columns": columns,
            "options": {**options, "max_tokens": args.max_tokens},
        }
        failed |= _scored(left, job, args, done=len(blocks) - len(left))
        done = len(blocks) - len(left)
        before = f" ({done} of {len(blocks)} blocks were finished before)" if done else ""
        print(f"{args.output}: {output.rows(SCORED)} rows in {SCORED}, {output.rows(ERRORS)} in {ERRORS}{before}")
    for name, reason in failed.items():
        print(f"error: {name}: {reason}", file=sys.stderr)
    return 2 if failed else 0


def _options(args: argparse.Namespace, recipe: Recipe | None) -> dict[str, Any]:
    """Return the options of a scorer on which its answers depend, after it has been made once.

    A model that cannot be loaded, or a tokenizer of another one, is an error here rather than in each worker.
    """
    scorer = scorer_of(args.model, recipe, truncate=args.truncate, max_tokens=args.max_tokens)
    return {"max_length": scorer.options.max_length, "truncate": args.truncate}


def _scored(left: list[Any], job: dict[str, Any], args: argparse.Namespace, *, done: int) -> dict[str, str]:
    """Score blocks, and return of each file that cannot be read its name and the reason."""
    if not left:
        return {}
    from earlyexit_kernels.serving.tables.actors import score_blocks  # requires the extra `ray`

    failed: dict[str, str] = {}
    with tqdm(total=done + len(left), initial=done, unit="block", disable=None) as bar:
        for block, problem in score_blocks(left, job, workers=args.workers, address=args.address):
            if problem:
                failed.setdefault(block.file.name, problem)
            bar.update()
    return failed
