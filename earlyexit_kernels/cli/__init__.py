"""Commands of `earlyexit`: one file per command with `run(args) -> exit code`; `earlyexit_cli` parses the arguments."""

from __future__ import annotations

import argparse
import logging
import sys

import torch
from transformers.utils.logging import disable_progress_bar

from earlyexit_kernels.cli import calibrate, demo, env, evaluate, predict, report, score, serve, train
from earlyexit_kernels.errors import BackendUnavailableError, MissingHeadsError

COMMANDS = {
    "demo": demo,
    "train": train,
    "eval": evaluate,
    "calibrate": calibrate,
    "report": report,
    "predict": predict,
    "score": score,
    "serve": serve,
    "env": env,
}

#: Errors in the input or the environment, reported in one line. Any other class is a bug and shows its traceback.
_USER_ERRORS = (
    ValueError,
    OSError,
    ImportError,
    MemoryError,
    torch.OutOfMemoryError,
    BackendUnavailableError,
    MissingHeadsError,
)


def run(args: argparse.Namespace) -> int:
    """Run the command ``args.command``.

    Returns:
        exit code: 0, 2 after an error in the input, reported in one line on stderr, or 130 after an interrupt.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    disable_progress_bar()  # those of loading and saving; training and measuring show their own
    try:
        return COMMANDS[args.command].run(args)
    except KeyboardInterrupt:
        return 130
    except _USER_ERRORS as error:
        if args.debug:
            raise
        print(f"error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2
