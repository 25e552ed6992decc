"""Commands of `earlyexit`: one file per command with `run(args) -> exit code`; `earlyexit_cli` parses the arguments."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys

import torch
from transformers.utils.logging import disable_progress_bar

from earlyexit_kernels.errors import BackendUnavailableError, MissingHeadsError

#: Errors in the input or the environment, reported in one line. Any other class is a bug and shows its traceback.
USER_ERRORS = (
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
    command = importlib.import_module(f"{__name__}.{args.command}")
    try:
        for module in getattr(args, "modules", ()):
            _import(module)
        return int(command.run(args))
    except KeyboardInterrupt:
        return 130
    except USER_ERRORS as error:
        if args.debug:
            raise
        print(f"error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2


def _import(module: str) -> None:
    """Import a module that registers criteria, methods or model families, from the current folder too.

    Raises:
        ImportError: there is no such module.
    """
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"--import: {module} cannot be imported: {error}") from error
