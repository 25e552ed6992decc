"""Files that a command will write: checked before the work begins, and named in the error if the write fails."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


def check_folder(argument: str, folder: Path) -> None:
    """Create a folder if it does not exist, and check that files can be written there.

    Args:
        argument: of the command line, for the message.
        folder: to write to.

    Raises:
        OSError: the folder cannot be created or written to.
    """
    with _refused(argument, "folder", folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")


def check_file(argument: str, file: Path) -> None:
    """Check that a file can be written; missing folders are created, an existing file stays as it is.

    Args:
        argument: of the command line, for the message.
        file: to write.

    Raises:
        OSError: it is a folder, or cannot be written.
    """
    with _refused(argument, "file", file):
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists():
            with file.open("ab"):
                return
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f"{file.name}."):
            return


def check_plot(argument: str, file: Path) -> None:
    """`check_file` for a plot, which needs matplotlib.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    if find_spec("matplotlib") is None:
        raise ImportError(f"{argument}: plots need matplotlib: `pip install earlyexit_kernels[plot]`")
    check_file(argument, file)


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Name the file or folder in the error of a write that fails: the system's own error often names none.

    Raises:
        OSError: whatever the system or safetensors reports, with the path.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} could not be written: {_reason(error)}") from error


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer.

    Raises:
        OSError: it cannot be written; the tokenizers library itself raises a bare Exception.
    """
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise OSError(f"the tokenizer cannot be saved: {error}") from error


@contextmanager
def _refused(argument: str, what: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(f"{argument}: expected a {what} that can be written to, got {path} ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
