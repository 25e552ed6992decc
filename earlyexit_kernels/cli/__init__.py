"""The command `earlyexit`: one file per command, each with `add_arguments(parser)` and `run(args) -> exit code`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

import torch
from transformers.utils.logging import disable_progress_bar

from earlyexit_kernels.cli import demo, env, evaluate, train
from earlyexit_kernels.cli.arguments import Parser
from earlyexit_kernels.errors import BackendUnavailableError, MissingHeadsError

COMMANDS = {"demo": demo, "train": train, "eval": evaluate, "env": env}

#: Wrong input, or something missing on the machine: one line is enough. Any other class is a fault of the program.
_USER_ERRORS = (
    ValueError,
    OSError,
    ImportError,
    MemoryError,
    torch.OutOfMemoryError,
    BackendUnavailableError,
    MissingHeadsError,
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(prog="earlyexit", description="Early exit for Hugging Face text classifiers.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").partition("\n")[0]
        command = commands.add_parser(
            name, help=summary, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments after the program's name; default: those of the process.

    Returns:
        0, or 2 after an error in the input, told in one line on stderr.
    """
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    disable_progress_bar()  # of loading and saving, over in a blink; training and measuring show their own
    try:
        return COMMANDS[args.command].run(args)
    except KeyboardInterrupt:
        return 130
    except _USER_ERRORS as error:
        if args.debug:
            raise
        print(f"error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2
