"""Atomic saves: all files of a save reach a folder or none, even if the process is killed.

The files are first written to a temporary folder inside the target, on the same file system. A rename of that folder
makes the save valid; then each file is moved into place. If the process ends between these moves, `check_finished`
refuses the target until `finish_save` or another save has completed them.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

STAGING = ".earlyexit-saving-"
UNFINISHED = ".earlyexit-unfinished-save"
#: Inside the temporary folder: the files of the save, and the names of the older weights that it replaces.
FILES, REPLACED = "files", "replaced.json"
#: ``model.safetensors``, its shards and its index, with transformers' variant if there is one.
WEIGHTS = re.compile(
    r"model(?P<variant>\.[^./]+?)?(-\d{5}-of-\d{5})?\.safetensors"
    r"|model\.safetensors\.index(?P<index_variant>\.[^./]+)?\.json"
)
#: Errors of `flock` on file systems without locks, where two processes that save at once are not kept apart.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.EINVAL}


class UnfinishedSaveError(OSError):
    """A save is valid, but not all of its files could be moved into place; none of them is lost."""


@contextmanager
def saved_whole(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Collect the files of one save in a temporary folder, then move them all into `folder`.

    Other files of the folder are kept, except weights of an earlier save that the new weights replace. If the body of
    the ``with`` statement raises, the folder is unchanged.

    Args:
        folder: created if it does not exist.

    Yields:
        The temporary folder to write to.

    Raises:
        OSError: the files cannot be written, or `folder` is a file.
    """
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"save: expected a folder, got the file {target}; choose another name, or remove it")
    target.mkdir(parents=True, exist_ok=True)
    with ExitStack() as cleanup:
        with _locked(target):
            staged = Path(tempfile.mkdtemp(prefix=STAGING, dir=target))
            cleanup.callback(shutil.rmtree, staged, ignore_errors=True)
            # held until the end, so that no other process removes the folder as an abandoned one
            cleanup.enter_context(_locked(staged))
            _remove_abandoned(target, staged)
        (staged / FILES).mkdir()
        yield staged / FILES
        if not any((staged / FILES).iterdir()):
            return
        with _locked(target):
            _complete(target)
            (staged / REPLACED).write_text(json.dumps(_replaced_weights(target, staged / FILES)), encoding="utf-8")
            _flush(staged)
            staged.rename(target / UNFINISHED)
            _complete(target)


def finish_save(folder: str | os.PathLike[str]) -> None:
    """Move the remaining files of an interrupted save into place; does nothing if no save was interrupted.

    Raises:
        OSError: a file cannot be moved or removed.
    """
    with _locked(Path(folder)):
        _complete(Path(folder))


def check_finished(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder with an unfinished save, whose files may belong to two saves.

    Raises:
        RuntimeError: a save is unfinished; the message says how to finish it.
    """
    if (Path(folder) / UNFINISHED).is_dir():
        raise RuntimeError(
            f"{folder}: a save was interrupted, or is running in another process, and some of its files are not in "
            f"place yet; {_cure(folder)}"
        )


def save_or_rescue(folder: Path, *savers: Callable[[Path], Any]) -> None:
    """Save to `folder`, or, if that fails, to a new folder in the system's temporary directory.

    Args:
        folder: gets all files, or none.
        savers: each writes some of the files to the folder it is given.

    Raises:
        OSError: the files are not in `folder`; the message says where they are, or that they are lost.
    """

    def save(place: Path) -> None:
        with saved_whole(place) as files:
            for saver in savers:
                saver(files)

    try:
        save(folder)
        return
    except UnfinishedSaveError:
        raise
    except OSError as error:
        failure = error
    try:
        rescue = Path(tempfile.mkdtemp(prefix="earlyexit-"))
    except OSError as error:
        raise OSError(_lost(folder, failure, tempfile.gettempdir(), error)) from failure
    try:
        save(rescue)
    except OSError as error:
        shutil.rmtree(rescue, ignore_errors=True)
        raise OSError(_lost(folder, failure, rescue, error)) from failure
    raise OSError(f"nothing could be saved in {folder} ({failure}); the trained model is in {rescue}") from failure


def _lost(folder: Path, failure: OSError, rescue: str | Path, error: OSError) -> str:
    return (
        f"nothing could be saved, neither in {folder} ({failure}) nor in {rescue} ({error}); the trained model is lost"
    )


def _cure(folder: str | os.PathLike[str]) -> str:
    path = os.path.abspath(folder)
    command = f'python -c "from earlyexit_kernels.hf.saving import finish_save; finish_save({path!r})"'
    return (
        f"the other files of that save are in {os.path.join(path, UNFINISHED)}. Move them into place with `{command}`, "
        "or save to this folder again"
    )


def _complete(target: Path) -> None:
    """Move the files of a valid save into place. May be interrupted and repeated at any point."""
    if not (target / UNFINISHED).is_dir():
        return
    try:
        _move_into_place(target, target / UNFINISHED)
    except OSError as error:
        raise OSError(f"the save to {target} is not finished: {error}; {_cure(target)}") from error


def _move_into_place(target: Path, unfinished: Path) -> None:
    replaced = unfinished / REPLACED
    if replaced.is_file():
        # listed before the first move: afterwards old and new weights could not be distinguished
        for name in json.loads(replaced.read_text(encoding="utf-8")):
            if WEIGHTS.fullmatch(name):
                (target / name).unlink(missing_ok=True)
        _sync(target)
        replaced.unlink()
    files = unfinished / FILES
    for path in sorted(p for p in files.rglob("*") if not p.is_dir()):
        place = target / path.relative_to(files)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.replace(place)
    _sync(target)
    shutil.rmtree(unfinished)


def _replaced_weights(target: Path, files: Path) -> list[str]:
    """Return the names of weights in the target that a load would read in place of or together with the new ones."""
    new = {path.name: _variant(path.name) for path in files.iterdir() if WEIGHTS.fullmatch(path.name)}
    old = (path.name for path in target.iterdir() if WEIGHTS.fullmatch(path.name))
    return sorted(name for name in old if name not in new and _variant(name) in new.values())


def _variant(name: str) -> str:
    found = WEIGHTS.fullmatch(name)
    return "" if found is None else found["variant"] or found["index_variant"] or ""


def _remove_abandoned(target: Path, own: Path) -> None:
    """Remove temporary folders of processes that have ended, whose locks are free."""
    for path in target.glob(f"{STAGING}*"):
        if path == own or not path.is_dir():
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            if _lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(descriptor)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes and threads from moving files in a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, operation: int) -> bool:
    """Return whether the lock was acquired."""
    try:
        fcntl.flock(descriptor, operation)
    except OSError as error:
        if error.errno in NO_LOCKS or isinstance(error, BlockingIOError):
            return False
        raise
    return True


def _flush(folder: Path) -> None:
    """Write files and folders to the disk; network file systems report a full disk only here."""
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some network file systems do not flush folders
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
