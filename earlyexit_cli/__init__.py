"""Parse the arguments of the command `earlyexit` and check its files, without importing torch.

Importing `earlyexit_kernels` imports torch and transformers, which takes seconds. This package lies beside it, so that
``--help``, ``--version`` and wrong arguments are answered at once; `earlyexit_kernels` is imported to run a command.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

from earlyexit_cli import arguments, files


class Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line on stderr."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"error: {' '.join(message.split())}; `{self.prog} --help` lists the arguments\n")


class Version(argparse.Action):
    """Print the version of the installed package."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        print(f"earlyexit {_version()}")
        parser.exit()


def _version() -> str:
    try:
        return importlib.metadata.version("earlyexit_kernels")
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        from earlyexit_kernels import __version__

        return __version__


def _nothing(_: Any) -> None:
    """Stand for no arguments, or no check."""


class Command(NamedTuple):
    """A command of `earlyexit`.

    Attributes:
        summary: one line for ``earlyexit --help``.
        details: further lines for ``earlyexit <command> --help``.
        add_arguments: adds the arguments to a parser.
        check: raises OSError, ValueError or ImportError for files that the command cannot read or write.
    """

    summary: str
    details: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    check: Callable[[argparse.Namespace], None] = _nothing


COMMANDS = {
    "train": Command(
        "Train a classifier with an exit after every layer, with the Trainer of transformers.",
        "Saves the model, its tokenizer, a model card, and the rows that were not trained on (heldout.parquet), from\n"
        "which calibrate and eval choose and report.",
        arguments.add_train,
        files.check_train,
    ),
    "calibrate": Command(
        "Choose the best criterion for a target, and save it with the model.",
        "Every setting is chosen on one half of the rows that train kept (or of --data), and measured on the other.\n"
        "Changes config.json and the model card; the weights only with --temperature.",
        arguments.add_calibrate,
        files.check_calibrate,
    ),
    "eval": Command(
        "Say what the saved criterion and every other rule reach on labelled rows.",
        "The saved criterion and each exit are measured on the rows of --data, or on the half of the kept rows that\n"
        "calibrate did not choose on. --report writes a page with pictures, which needs no network and no script.",
        arguments.add_eval,
        files.check_eval,
    ),
    "predict": Command(
        "Classify texts, or the rows of files, with a saved early-exit model.",
        "Adds the columns label, score and exit_layer to those of the input (predicted_label, ... if it has these).\n"
        "An existing file is not overwritten. A folder gets Parquet files, with a column error, and the same command\n"
        "again goes on where a run has ended.",
        arguments.add_predict,
        files.check_predict,
    ),
    "serve": Command(
        "Serve a saved early-exit model over HTTP.",
        "Listens when the model is loaded: POST /predict, and /, /health, /info, /metrics. SIGTERM ends it when the\n"
        "requests under way are answered. Clients must send the key in the variable EARLYEXIT_API_KEY, where there is\n"
        "one. Requires the extra serve.",
        arguments.add_serve,
        files.check_serve,
    ),
    "demo": Command(
        "Run train, calibrate, eval and predict on generated sentences, and measure the time that early exit saves.",
        "Takes about a minute and needs no network. All printed numbers are measured.",
        arguments.add_demo,
        files.check_demo,
    ),
    "env": Command("Show versions, the machine, and the back-ends that are available.", "", _nothing),
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = Parser(prog="earlyexit", description="Early exit for Hugging Face text classifiers.")
    parser.add_argument("--version", action=Version, nargs=0, help="show the version and exit")
    debug: dict[str, Any] = {"action": "store_true", "help": "show the traceback of an error"}
    parser.add_argument("--debug", **debug)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, command in COMMANDS.items():
        added = commands.add_parser(
            name,
            help=command.summary,
            description=f"{command.summary}\n\n{command.details}".rstrip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(added)
        added.add_argument("--debug", default=argparse.SUPPRESS, **debug)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments after the program's name (default: those of the process).

    Returns:
        exit code: 0, 2 after an error in the input, reported in one line on stderr, or 130 after an interrupt.
    """
    args = build_parser().parse_args(argv)
    try:
        COMMANDS[args.command].check(args)
    except (OSError, ValueError, ImportError) as error:
        if args.debug:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    from earlyexit_kernels.cli import run  # after everything that can be answered without torch

    return run(args)
