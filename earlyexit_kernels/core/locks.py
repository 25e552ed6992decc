"""Locks that survive a fork."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any


class ForkSafeLock:
    """A lock that a forked child can acquire, even if another thread of the parent held it at the fork."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: int | None = None
        _ALL.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()
        self._holder = threading.get_ident()

    def __exit__(self, *_: object) -> None:
        self._holder = None
        self._lock.release()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies are locks of their own."""
        return ForkSafeLock, ()

    def renew(self) -> None:
        """Replace the lock by a new one, unless this thread, the only one of a forked child, holds it."""
        if self._holder != threading.get_ident():
            self._lock, self._holder = threading.Lock(), None


_ALL: weakref.WeakSet[ForkSafeLock] = weakref.WeakSet()


def _renew_all() -> None:
    for lock in _ALL:
        lock.renew()


os.register_at_fork(after_in_child=_renew_all)
