"""Locks that survive a fork."""

from __future__ import annotations

import os
import threading
import weakref


class ForkSafeLock:
    """A lock that is released in a forked child, where the thread that held it does not exist."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        _ALL.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def renew(self) -> None:
        """Replace the lock by a new one."""
        self._lock = threading.Lock()


_ALL: weakref.WeakSet[ForkSafeLock] = weakref.WeakSet()


def _renew_all() -> None:
    for lock in _ALL:
        lock.renew()


os.register_at_fork(after_in_child=_renew_all)
