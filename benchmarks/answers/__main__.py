"""Command line of `benchmarks.answers`; see there."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.answers.comparison import compare
from benchmarks.answers.groups import GROUPS, prepare, record, spread, summary
from benchmarks.answers.models import FAMILIES
from benchmarks.answers.recording import Recording
from benchmarks.versions import ROOT, check_imported, checked_out, linked

#: Processes of a recording, of one thread each.
PROCESSES = 2
#: Folder of a recording with the models that it has saved.
MODELS = "models"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, and return the exit status."""
    args = _parser().parse_args(arguments)
    if args.command == "worker":
        prepare()
        read = None if args.read is None else args.read / MODELS
        record(args.groups, args.families, written=args.models, read=read).save(args.out)
        return 0
    if args.command == "record":
        recorded(args.out, args.package, groups=args.groups, families=args.families, read=args.read)
        return 0
    if args.command == "compare":
        return _compared(args.base, args.here)
    with tempfile.TemporaryDirectory(prefix="earlyexit-answers-") as folder, checked_out(args.ref, folder) as tree:
        base, here = Path(folder) / "base", Path(folder) / "here"
        recorded(base, tree, groups=args.groups, families=args.families)
        recorded(here, ROOT, groups=args.groups, families=args.families, read=base)
        return _compared(base, here)


def recorded(
    out: Path, package: Path, *, groups: Sequence[str] = (), families: Sequence[str] = (), read: Path | None = None
) -> None:
    """Record the answers of a package, in processes of their own, and print what was recorded.

    Args:
        out: folder of the recording.
        package: folder that holds ``earlyexit_kernels``.
        groups, families: what to record; default: all.
        read: recording whose saved models are loaded in place of those that are saved now.
    """
    chosen = list(families or FAMILIES)
    parts = [chosen[number::PROCESSES] for number in range(PROCESSES) if chosen[number::PROCESSES]]
    with tempfile.TemporaryDirectory(prefix="earlyexit-record-") as text:
        folder = Path(text)
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.answers", "worker"]
        options = [*(["--groups", *groups] if groups else []), *(["--read", str(read.resolve())] if read else [])]
        options += ["--models", str(out.resolve() / MODELS)]
        environment = linked(package, folder) | {"OMP_NUM_THREADS": "1"}
        workers = [
            subprocess.Popen(
                [*command, str(folder / str(number)), "--families", *part, *options], cwd=folder, env=environment
            )
            for number, part in enumerate(parts)
        ]
        if any(list(map(subprocess.Popen.wait, workers))):
            raise SystemExit("answers: a recording ended early; its message is above")
        joined = Recording.joined([Recording.load(folder / str(number)) for number in range(len(parts))])
    check_imported(package, joined.about["package"])
    joined.save(out)
    print(summary(joined), spread(joined), sep="\n", flush=True)


def _compared(base: Path, here: Path) -> int:
    found = compare(Recording.load(base), Recording.load(here))
    print(found.report())
    return int(found.failed())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.answers", description="see benchmarks/answers/__init__.py"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    selection = argparse.ArgumentParser(add_help=False)
    selection.add_argument("--groups", nargs="+", choices=GROUPS, default=(), help="default: all")
    selection.add_argument("--families", nargs="+", choices=FAMILIES, default=(), help="default: all")
    reading = argparse.ArgumentParser(add_help=False)
    reading.add_argument("--read", type=Path, metavar="RECORDING", help="load the models that another recording saved")
    record_ = commands.add_parser("record", parents=[selection, reading], help="record the answers of one version")
    record_.add_argument("out", type=Path, help="folder of the recording")
    record_.add_argument(
        "--package", type=Path, default=ROOT, help="folder with earlyexit_kernels (default: this tree)"
    )
    worker = commands.add_parser("worker", parents=[selection, reading], help="one process of a recording")
    worker.add_argument("out", type=Path)
    worker.add_argument("--models", type=Path)
    compare_ = commands.add_parser("compare", help="compare two recordings")
    compare_.add_argument("base", type=Path)
    compare_.add_argument("here", type=Path)
    against = commands.add_parser("against", parents=[selection], help="compare this tree with a git ref")
    against.add_argument("ref")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
