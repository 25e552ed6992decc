"""Score the tables of many files with a saved early-exit model, in this process or by workers of Ray."""

from __future__ import annotations

import argparse
import sys

from tqdm import tqdm

from earlyexit_kernels.cli.predict import scorer_of
from earlyexit_kernels.cli.saved import Record, columns_of


def run(args: argparse.Namespace) -> int:
    """Score the units that are not finished; the exit code is 2 if a file cannot be read."""
    named = columns_of(args, Record.load(args.model))
    from earlyexit_kernels.serving.files import plan, score_units

    # a model that cannot be loaded, or a tokenizer of another one, is an error here rather than in each worker
    scorer = scorer_of(args.model, truncate=args.truncate, max_tokens=args.max_tokens)
    todo = plan(
        args.model,
        args.input,
        args.output,
        columns=tuple(name for name in (named.text, named.pair) if name is not None),
        max_length=scorer.options.max_length,
        truncate=args.truncate,
        max_tokens=args.max_tokens,
        overwrite=args.overwrite,
    )
    del scorer
    units = todo.finished + len(todo.units)
    print(f"{todo.files} file(s), {len(todo.units)} of {units} units to score", file=sys.stderr, flush=True)
    done = list(todo.problems)
    with tqdm(total=units, initial=todo.finished, unit="unit", disable=None) as bar:
        for unit in score_units(todo.job, todo.units, args.workers) if todo.units else ():
            done.append(unit)
            bar.update()
    scored = [one for one in done if not one.problem]
    without = sum(one.without for one in scored)
    parts = [f"{args.output}: {sum(one.rows for one in scored)} rows in {len(scored)} file(s)"]
    parts += [f"{without} of them without an answer"] if without else []
    before = f" ({todo.finished} of {units} units were finished before)" if todo.finished else ""
    print(f"{', '.join(parts)}{before}")
    problems = {one.file: one.problem for one in done if one.problem}
    for file, reason in problems.items():
        print(f"error: {file}: {reason}", file=sys.stderr)
    return 2 if problems else 0
