"""Check the files that a command will write before it begins, and name them in the error of a failed write."""

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

from earlyexit_kernels.tuning.tables import partial_file

#: One of these is among the first bytes of a file of results: its HTML title, or the first entry of its JSON.
MARKS = (b"<title>Early-exit report", b'"environment"')
READ_BYTES = 4096


def check_folder(argument: str, folder: Path) -> None:
    """Create a folder if it does not exist, and check that files can be written there.

    Args:
        argument: name of the argument, for the message.
        folder: output folder.

    Raises:
        OSError: the folder cannot be created or written to.
    """
    with _refused(argument, "folder", folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")


def check_no_model(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that has a model, unless it is to be replaced.

    Args:
        folder: the argument --output.
        overwrite: the argument --overwrite.

    Raises:
        FileExistsError: it has one.
    """
    if not overwrite and (folder / "config.json").is_file():
        raise FileExistsError(
            f"--output: {folder} has a model already, which is not overwritten; give another folder, or --overwrite"
        )


def check_file(argument: str, file: Path) -> None:
    """Check that a file of results can be written; missing folders are created, an existing file is not changed.

    Args:
        argument: name of the argument, for the message.
        file: output file, HTML or JSON. One that these commands wrote earlier may be replaced.

    Raises:
        OSError: it is a folder, cannot be written, or has something else in it.
    """
    _check_replaceable(argument, file)
    with _refused(argument, "file", file):
        _check_no_folder(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = partial_file(file)
        if beside is not None:
            with beside.open("ab"):
                beside.unlink()
        elif not os.access(file, os.W_OK):  # not opened: a pipe without a reader would block
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _check_replaceable(argument: str, file: Path) -> None:
    """Raise FileExistsError if a file has something else than results in it."""
    with _refused(argument, "file", file):
        readable = file.is_file() and os.access(file, os.R_OK)
    if not readable:
        return
    with file.open("rb") as held:
        begin = held.read(READ_BYTES)
    if begin and not any(mark in begin for mark in MARKS):
        raise FileExistsError(
            f"{argument}: {file} exists and was not written by earlyexit, so that it is not overwritten; give another "
            "file"
        )


def check_plot(argument: str, file: Path) -> None:
    """Check that matplotlib can write a plot; missing folders are created, an existing file is not changed.

    Args:
        argument: name of the argument, for the message.
        file: output file.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: it is a folder, or cannot be written.
    """
    if find_spec("matplotlib") is None:
        raise ImportError(f"{argument}: plots require matplotlib: `pip install matplotlib`")
    with _refused(argument, "file", file):
        _check_no_folder(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists():
            with file.open("ab"):
                return
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f"{file.name}."):
            return


def _check_no_folder(file: Path) -> None:
    if file.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Add the path to the error of a failed write; errors of the system often name none.

    Raises:
        OSError: the reason that the system or safetensors gives, with the path.
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
        OSError: it cannot be written (the tokenizers library raises a bare Exception).
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
