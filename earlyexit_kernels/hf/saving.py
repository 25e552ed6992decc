"""Saves that leave the old files, the new ones, or a folder that a load refuses, wherever the process is killed.

The files of a save are written to a folder ``.saving-*`` inside the target, which is flushed and renamed when it is
complete. Then each file is linked over the old one: weights first, the config last, whose digest of the weights refuses
every mixture. The complete copy is removed when all files are in place.
"""

from __future__ import annotations

import errno
import filecmp
import os
import platform
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

CONFIG = "config.json"
#: Entry of a saved config: the digest of its weights. That of a variant has its name behind a dot.
DIGEST = "weights_digest"
#: Beginning of the name of a folder with the files of a save, and its end when all of them are written.
STAGING, COMPLETE = ".saving-", ".complete"
#: ``model.safetensors``, its shards and its index, with transformers' variant if there is one.
WEIGHTS = re.compile(
    r"model(?P<variant>\.[^./]+?)?(-\d{5}-of-\d{5})?\.safetensors"
    r"|model\.safetensors\.index(?P<index_variant>\.[^./]+)?\.json"
)
#: How often files are moved into place while other processes save to the same folder.
ATTEMPTS = 10


class UnfinishedSaveError(OSError):
    """Not all files of a save could be moved into place; the message names the folder that has all of them."""


@contextmanager
def saved_whole(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder, then move the files written to it into `folder`, which is created if necessary.

    Other files of the folder are kept, except weights that the new ones replace. If the body of the ``with`` statement
    raises, the folder is unchanged. Of processes that save at once, one wins.

    Raises:
        OSError: the files cannot be written, or `folder` is a file.
    """
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"save: expected a folder, got the file {target}; choose another name, or remove it")
    target.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    staged = Path(tempfile.mkdtemp(prefix=f"{STAGING}{platform.node()}-{os.getpid()}-", dir=target))
    try:
        yield staged
        nothing = not any(staged.iterdir())
        _flush(staged)
        complete = staged.rename(staged.with_name(staged.name + COMPLETE))
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    if not nothing:
        _move_into_place(complete, target)
    shutil.rmtree(complete, ignore_errors=True)
    with suppress(OSError):
        _remove_leftovers(target, "" if nothing else COMPLETE)


def complete_copies(folder: str | os.PathLike[str]) -> list[Path]:
    """Return folders with all files of a save that was interrupted, or is running, while they were moved into place."""
    return sorted(Path(folder).glob(f"{STAGING}*{COMPLETE}"))


def variant_of(name: str) -> str | None:
    """Return the variant of a file of weights, with its dot; "" without a variant, None for another file."""
    found = WEIGHTS.fullmatch(name)
    return None if found is None else found["variant"] or found["index_variant"] or ""


def save_or_rescue(folder: Path, *savers: Callable[[Path], Any]) -> None:
    """Save to `folder`, or, if that fails, to a new folder in the system's temporary directory.

    Args:
        folder: gets all files, or none.
        savers: each writes some of the files to the folder it is given.

    Raises:
        UnfinishedSaveError: the files are inside `folder`; the message says where.
        OSError: the files are not in `folder`; the message says where they are, or that they are lost.
    """

    def save(place: Path) -> None:
        with saved_whole(place) as files:
            for saver in savers:
                saver(files)

    rescue: Path | None = None
    try:
        return save(folder)
    except UnfinishedSaveError:
        raise
    except OSError as error:
        failure = error
    try:
        rescue = Path(tempfile.mkdtemp(prefix="earlyexit-"))
        save(rescue)
    except OSError as error:
        if rescue is not None:
            shutil.rmtree(rescue, ignore_errors=True)
        raise OSError(
            f"nothing could be saved, neither in {folder} ({failure}) nor in {rescue or tempfile.gettempdir()} "
            f"({error}); the trained model is lost"
        ) from failure
    raise OSError(f"nothing could be saved in {folder} ({failure}); the trained model is in {rescue}") from failure


def _move_into_place(staged: Path, target: Path) -> None:
    """Give `target` all files of a complete copy, and remove the weights that they replace.

    Raises:
        UnfinishedSaveError: a file cannot be moved or removed.
    """
    places = {path: target / path.relative_to(staged) for path in staged.rglob("*") if not path.is_dir()}
    variants = {variant_of(path.name) for path in places} - {None}
    try:
        for attempt in range(ATTEMPTS):
            for path in sorted(places, key=_turn):
                _link(path, places[path], staged / ".next")
            _sync(target)
            for path in target.iterdir():
                if variant_of(path.name) in variants and path not in places.values():
                    path.unlink(missing_ok=True)
            _sync(target)
            if all(_same(path, place) for path, place in places.items()):
                return
            # another process saves at the same time
            time.sleep(attempt * secrets.randbelow(100) / 1000)
        raise OSError("other processes save to it all the time")
    except OSError as error:
        raise UnfinishedSaveError(
            f"the save to {target} is not finished: {error}; all of its files are in {staged}. Move them into place, "
            "or save to this folder again"
        ) from error


def _turn(path: Path) -> tuple[bool, bool, bool, Path]:
    """Shards come before their index, it before other files, and those before the config."""
    return path.name == CONFIG, variant_of(path.name) is None, path.suffix == ".json", path


def _same(path: Path, place: Path) -> bool:
    try:
        return filecmp.cmp(path, place)
    except FileNotFoundError:
        return False


def _link(path: Path, place: Path, spare: Path) -> None:
    """Replace a file by another one, which keeps its name; by a copy on file systems without hard links."""
    place.parent.mkdir(parents=True, exist_ok=True)
    spare.unlink(missing_ok=True)
    try:
        spare.hardlink_to(path)
    except OSError:
        shutil.copy2(path, spare)
        _sync(spare)
    spare.replace(place)


def _remove_leftovers(target: Path, ending: str = "") -> None:
    """Remove temporary folders of processes of this machine that have ended; complete ones also of this process."""
    name = re.compile(rf"{re.escape(STAGING + platform.node())}-(\d+)-\w+{re.escape(ending)}")
    for path in target.iterdir():
        found = name.fullmatch(path.name)
        if found and ((ending and int(found[1]) == os.getpid()) or not _runs(int(found[1]))):
            shutil.rmtree(path, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (OSError, OverflowError) as error:
        return not isinstance(error, ProcessLookupError)
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
